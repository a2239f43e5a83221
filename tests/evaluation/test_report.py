"""The report shows the generation that it is about, and works in a browser without a network."""

import json
import re
import shutil

import pytest
import torch

import anee
from anee_core.errors import InputError
from anee_core.evaluation import replay, write_report

POLICY = "random:p=0.4,protect=1 1+window:sinks=1,recent=6"


@pytest.fixture(scope="module")
def generated(llama_folder):
    model = anee.load(llama_folder, POLICY)
    result = model.generate("<the cat> saw & ran", max_new_tokens=9)
    return model, result, result.sequences[0, :-1]


def test_the_replay_is_what_was_generated(generated):
    model, result, ids = generated
    seen = replay(model, ids, 19)
    assert torch.equal(seen.ran, result.trace.ran[:, 0])
    assert torch.equal(seen.held, result.trace.held[:, 0])
    assert "".join(seen.tokens) == "<the cat> saw & ran" + result.completion[:-1]
    assert float(seen.spent.mean()) == pytest.approx(result.trace.budget_spent, abs=0.02)
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True).hidden_states
        logits = model(ids[None]).logits[0]
    change = (states[2] - states[1])[0].norm(dim=-1) / states[1][0].norm(dim=-1)
    torch.testing.assert_close(seen.change[1], change, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(seen.confidence, logits.softmax(-1).amax(-1), atol=1e-4, rtol=1e-3)
    assert not seen.ran.all()
    assert seen.change[:-1][~seen.ran[:-1]].max() == 0


def test_a_prompt_that_was_read_densely_is_read_so_again(llama_folder):
    model = anee.load(llama_folder, "heuristic:protect=1 1", 0.8)
    result = model.generate("the cat saw a dog", max_new_tokens=6)
    seen = replay(model, result.sequences[0, :-1], 17)
    assert seen.ran[:, :17].all()
    assert torch.equal(seen.ran, result.trace.ran[:, 0])


def test_the_page_holds_everything(generated, tmp_path):
    model, _, ids = generated
    page = write_report(model, ids, 19, tmp_path / "out" / "page.html").read_text()
    spans = re.findall(r'<span class="(prompt|new)" data-token="(\d+)"[^>]*>([^<]*)</span>', page)
    assert [kind for kind, _, _ in spans] == ["prompt"] * 19 + ["new"] * 8
    assert "".join(text for _, _, text in spans).startswith("&lt;the cat&gt; saw &amp; ran")
    assert POLICY in page
    assert "decoder-layer FLOPs" in page
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="https?:', page)


def test_wrong_input_is_refused(generated, tiny_llama):
    model, _, ids = generated
    with pytest.raises(InputError, match="begin with a prompt"):
        replay(model, ids[None], 3)
    with pytest.raises(InputError, match="begin with a prompt"):
        replay(model, ids, 0)
    with pytest.raises(InputError, match="needs a tokenizer"):
        replay(anee.load(tiny_llama), ids, 3)


def test_command_line(llama_folder, tmp_path, run_anee):
    out = tmp_path / "page.html"
    done = run_anee("report", llama_folder, "the cat", "--policy", POLICY, "-n", "4", "--out", out)
    assert done.code == 0, done.err
    assert out.read_text().count("data-token=") == 7 + 3
    done = run_anee("report", llama_folder, "the cat", "--policy", POLICY, "-n", "1", "--out", out)
    assert done.code == 0, done.err
    assert out.read_text().count("data-token=") == 7


@pytest.mark.real
@pytest.mark.skipif(shutil.which("chromium") is None or shutil.which("chromedriver") is None, reason="needs Chromium")
def test_it_works_in_a_browser(generated, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    model, _, ids = generated
    page = write_report(model, ids, 19, tmp_path / "page.html")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = [
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
        "disable-quic",
    ]
    for flag in [*flags, "disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.chrome.service.Service(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    try:
        browser.set_window_size(1200, 2400)
        browser.get(page.as_uri())
        for name in ("layers", "change", "kept", "budget", "signals"):
            assert browser.find_elements(By.CSS_SELECTOR, f"#{name} .main-svg"), name
        drawn = browser.execute_script("return document.getElementById('layers').data[0].z")
        assert drawn == replay(model, ids, 19).ran.int().tolist()
        ActionChains(browser).move_to_element(browser.find_element(By.CSS_SELECTOR, '[data-token="5"]')).perform()
        shapes = "return document.getElementById('kept').layout.shapes"
        WebDriverWait(browser, 10).until(lambda b: b.execute_script(shapes))
        assert [shape["x0"] for shape in browser.execute_script(shapes)] == [4.5]
        ActionChains(browser).move_to_element(browser.find_element(By.CSS_SELECTOR, "#layers .drag")).perform()
        WebDriverWait(browser, 10).until(
            lambda b: "layer" in b.find_element(By.CSS_SELECTOR, "#layers .hoverlayer").text
        )
        assert [json.loads(json.dumps(line)) for line in browser.get_log("browser")] == []
    finally:
        browser.quit()
