"""SmolLM2-135M, end to end. Marked: it needs the packaged weights and a minute or two."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import anee
from anee_core.calibration import CalibrationOptions
from anee_core.errors import PolicyError
from anee_core.evaluation.divergence import divergence

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[1]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def smollm2(shared_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANEE_CACHE", str(shared_cache))
        return anee.load("smollm2")


@pytest.fixture(autouse=True)
def anee_cache(shared_cache, monkeypatch):
    """Unpack the weights once for all tests here, instead of a cache folder for each."""
    monkeypatch.setenv("ANEE_CACHE", str(shared_cache))


def test_dense_is_transformers_bit_for_bit(smollm2):
    ids = smollm2.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    modules = anee.load(smollm2.model, fast=False)
    with torch.no_grad():
        wanted = smollm2.model(ids).logits
        assert torch.equal(modules(ids).logits, wanted)
        torch.testing.assert_close(smollm2(ids).logits, wanted, atol=2e-3, rtol=1e-3)
    assert smollm2.slow_because is None
    expected = smollm2.model.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(smollm2.generate(ids, max_new_tokens=20, do_sample=False), expected)
    assert torch.equal(smollm2.decode(ids, max_new_tokens=20).sequences, expected)
    assert "Paris" in smollm2.generate(PROMPT, max_new_tokens=5).text


def test_parallel_equals_stepwise_on_real_weights(smollm2):
    model = anee.load(smollm2.model, "random", 0.7, tokenizer=smollm2.tokenizer)
    ids = model.tokenizer("The history of Rome began a long time ago, when", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.new_cache()
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])]
    torch.testing.assert_close(whole, torch.cat(steps, dim=1), atol=2e-3, rtol=2e-3)


def test_heuristic_meets_its_budget_and_keeps_the_text_readable(smollm2):
    model = anee.load(
        smollm2.model,
        "heuristic",
        0.85,
        tokenizer=smollm2.tokenizer,
        calibration=CalibrationOptions(sequences=2, length=48, progress=False),
    )
    result = model.generate(PROMPT, max_new_tokens=60, eos_token_id=[])
    assert result.trace.budget_spent == pytest.approx(0.85, abs=0.01)
    assert 0.8 < result.trace.layers_run < 0.85
    words = result.completion.split()
    assert sum(word.strip(".,\"'!?;:()").isalpha() for word in words) > 0.7 * len(words)


def test_second_load_takes_the_unpacked_weights(smollm2):
    again = anee.load("smollm2", dtype="bfloat16")
    assert again.dtype == torch.bfloat16
    assert torch.equal(
        again.model.model.embed_tokens.weight, smollm2.model.model.embed_tokens.weight.to(torch.bfloat16)
    )


def test_demo_runs(smollm2):
    command = [sys.executable, "examples/demo.py", "--max-new-tokens", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("layers run per token", "K/V cache, MB", "tokens/s", "int8"):
        assert line in done.stdout
    assert "█" in done.stdout


PAGES = ("README.md", "docs/quickstart.md", "docs/policies.md", "docs/models.md", "docs/tools.md")


def commands_of(page):
    """Return the commands that a page shows and none of the pages before it."""
    shown = [re.findall(r"^anee (.*)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE) for name in PAGES]
    before = {command for name in shown[: PAGES.index(page)] for command in name}
    return [command for command in shown[PAGES.index(page)] if command not in before]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs(smollm2, tmp_path, page, run_anee, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 200)
    trained = ["--steps", "2", "--length", "64", "--batch", "1", "--valid-blocks", "1"]
    gated = [*trained, "--calibration-sequences", "6"]
    short = {
        "train asa": trained,
        "train supervised": gated,
        "train rl": [*gated, "--reinforce-steps", "1", "--rollouts", "2"],
        "calibrate smollm2": ["--sequences", "8", "--length", "48"],
        "eval smollm2": ["--tasks-dir", ".", "--limit", "1"],
        "sweep smollm2": ["--budgets", "0.9", "--length", "64", "--blocks", "1", "--repeats", "1", "--no-baselines"],
        "publish smollm2": ["--length", "64", "--blocks", "1"],
        "report smollm2": ["-n", "8"],
    }
    # Tasks by the names of lm-eval's, which come from a hub.
    (tmp_path / "lambada_openai.jsonl").write_text('{"context": "The capital of France is", "continuation": "Paris"}\n')
    (tmp_path / "piqa.jsonl").write_text(
        '{"query": "Question: to sit?\\n", "choices": ["a chair", "a fish"], "gold": 0}\n'
    )
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    commands = commands_of(page)
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        done = run_anee(*words, *short.get(" ".join(words[:2]), []))
        assert done.code == 0, command + done.out + done.err
    if page == "docs/quickstart.md":  # the README shows many models
        text = (ROOT / page).read_text(encoding="utf-8")
        code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
        exec(compile(code, page, "exec"), {})


def test_bundled_asa_drops_much_and_costs_little(smollm2):
    ids = smollm2.tokenizer((ROOT / "LICENSE").read_text(), return_tensors="pt")["input_ids"][:, :800]
    sparse, window = anee.load(smollm2.model, "asa"), anee.load(smollm2.model, "window:sinks=4,keep=0.4")
    losses = {}
    for name, model in (("dense", smollm2), ("asa", sparse), ("window", window)):
        with torch.no_grad():
            losses[name] = float(torch.nn.functional.cross_entropy(model(ids).logits[0, 200:-1], ids[0, 201:]))
    assert sparse.last_trace.context_dropped > 0.3
    assert losses["asa"] < losses["dense"] + 0.2
    assert losses["asa"] < losses["window"]


def test_tuned_source_drops_more_with_its_own_asa(smollm2):
    tuned = anee.load("smollm2-asa", "asa")
    ids = smollm2.tokenizer((ROOT / "LICENSE").read_text(), return_tensors="pt")["input_ids"][:, :800]
    losses = []
    for model in (smollm2, tuned):
        with torch.no_grad():
            losses.append(float(torch.nn.functional.cross_entropy(model(ids).logits[0, 200:-1], ids[0, 201:])))
    assert tuned.last_trace.context_dropped > 0.55
    assert losses[1] < losses[0] + 0.15
    with pytest.raises(PolicyError, match="trained together"):
        anee.load(smollm2.model, f"asa:{tuned.policy.cache_policy.folder}")


def test_bundled_rl_meets_its_budget_and_costs_less_than_chance(smollm2):
    prose = smollm2.generate("The history of the Roman Empire", max_new_tokens=250, do_sample=True, seed=0)
    ids, apart = prose.sequences, {}
    with torch.no_grad():
        dense = smollm2(ids).logits
        for policy in ("rl", "random+shortcuts", "random"):
            model = anee.load(smollm2.model, policy, 0.8)
            apart[policy] = float(divergence(dense, model(ids).logits))
            assert model.last_trace.budget_spent == pytest.approx(0.8, abs=0.04)
    assert apart["rl"] < 0.5 * apart["random+shortcuts"] < 0.5 * apart["random"]
