"""The command line as a user meets it: what it prints, and one readable line for everything that goes wrong."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import anee
from anee_core.errors import MissingPackageError


@pytest.fixture
def spoilt(llama_folder, tmp_path):
    """Return a copy of the model folder to spoil."""
    folder = tmp_path / "spoilt"
    shutil.copytree(llama_folder, folder)
    return folder


def edit_weights(folder, edit):
    file = folder / "model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def refused(outcome):
    """Return the one line that a refused command prints."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    (line,) = outcome.errors
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# What works.


def test_generate_prints_the_text_and_says_what_ran(run_anee, llama_folder):
    outcome = run_anee("generate", llama_folder, "Hello you", "--policy", "static:skip=1", "-n", 5)
    assert outcome.code == 0
    model = anee.load(llama_folder, "static:skip=1")
    assert outcome.out == model.generate("Hello you", max_new_tokens=5, do_sample=False).text + "\n"
    assert outcome.out.startswith("Hello you")
    assert "static:skip=1, budget none" in outcome.errors
    assert any(re.match(r"layers run per token +75.0%", line) for line in outcome.errors)
    assert any(line.endswith("tokens/s") for line in outcome.errors)


def test_weights_can_be_quantised(run_anee, llama_folder):
    whole, small = (
        json.loads(run_anee("generate", llama_folder, "Hello you", "-n", 3, "--json", *options).out)["trace"]
        for options in ((), ("--weights", "int8"))
    )
    assert small["weight_bytes"]["layers"] < 0.5 * whole["weight_bytes"]["layers"]
    assert refused(run_anee("generate", llama_folder, "Hello you", "--weights", "int3")).startswith("weights can be")


def test_json_is_one_object_with_text_and_trace(run_anee, llama_folder):
    options = ("--policy", "static:skip=1", "--budget", 0.9, "-n", 5, "--json", "--stream", "--picture")
    outcome = run_anee("generate", llama_folder, "Hello you", *options)
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert report["text"] == "Hello you" + report["completion"]
    assert len(report["new_tokens"]) == 5
    assert (report["model"], report["policy"], report["budget"]) == (str(llama_folder), "static:skip=1", 0.9)
    assert report["tokens_per_second"] > 0
    trace = report["trace"]
    ran = torch.tensor(trace["ran"])
    assert ran.shape == (4, 1, 9 + 4)
    assert (ran[1] == 0).all()
    assert (ran[[0, 2, 3]] == 1).all()
    assert trace["layers_run"] == 0.75
    assert 0.75 < trace["budget_spent"] < 0.9
    assert trace["kept"] == [[13]] * 4
    assert "".join(trace["tokens"][0]).startswith("Hello you")
    assert not outcome.errors


def test_stream_prints_the_text_once(run_anee, llama_folder):
    arguments = ("generate", llama_folder, "Hello you", "-p", "static:skip=1", "-n", 8)
    whole = run_anee(*arguments)
    streamed = run_anee(*arguments, "--stream")
    assert streamed.code == 0
    assert streamed.out == whole.out
    assert any("layers run per token" in line for line in streamed.errors)


def test_stream_leaves_special_tokens_out_like_the_text(run_anee, spoilt):
    """Zeroed final norm: all logits are equal, and the first token, <pad>, is the likeliest for ever."""
    edit_weights(spoilt, lambda weights: weights["model.norm.weight"].zero_())
    arguments = ("generate", spoilt, "Hello", "-n", 3)
    assert json.loads(run_anee(*arguments, "--json").out)["new_tokens"] == [0, 0, 0]
    assert run_anee(*arguments).out == "Hello\n"
    assert run_anee(*arguments, "--stream").out == "Hello\n"


def test_sampling_with_a_seed_is_repeatable(run_anee, llama_folder):
    def text(*options):
        return run_anee("generate", llama_folder, "Hello", "-n", 12, *options).out

    assert text("--sample", "--seed", 3) == text("--sample", "--seed", 3)
    assert len({text("--sample", "--seed", seed) for seed in range(3)} | {text()}) == 4


def test_picture_shows_a_row_per_token_and_a_mark_per_layer(run_anee, llama_folder):
    outcome = run_anee("generate", llama_folder, "Hello", "-p", "static:skip=1", "-n", 3, "--picture")
    rows = [line for line in outcome.errors if "█" in line]
    assert len(rows) == 5 + 2
    assert all("█·██" in row for row in rows)
    assert rows[0].split()[0] == "H"


def test_saved_policy_is_given_by_its_folder(run_anee, llama_folder, tmp_path):
    anee.load(llama_folder, "static:skip=2").policy.save(tmp_path / "saved")
    outcome = run_anee("generate", llama_folder, "Hello", "-p", tmp_path / "saved", "-n", 3, "--json")
    assert json.loads(outcome.out)["policy"] == "static:skip=2"


def test_calibrating_policy_says_nothing_on_stdout(run_anee, llama_folder, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = ("-p", "heuristic:protect=1 1", "-b", 0.7, "--calibration-text", tmp_path / "text.txt")
    outcome = run_anee("generate", llama_folder, "Hello", *options, "-n", 6, "--json")
    report = json.loads(outcome.out)
    assert report["budget"] == 0.7
    assert report["trace"]["budget_spent"] < 0.95


def test_help_lists_the_commands_and_every_option(run_anee):
    assert {"generate", "plugins"} <= set(run_anee("--help").out.split())
    text = run_anee("generate", "-h").out
    for option in (
        "--policy",
        "--budget",
        "--max-new-tokens",
        "--device",
        "--dtype",
        "--stream",
        "--json",
        "--picture",
    ):
        assert option in text


def test_module_runs_and_help_imports_no_torch():
    """Also the check that a help page comes at once."""
    script = (
        "import runpy, sys; sys.argv = ['anee', '--help']\n"
        "try:\n    runpy.run_module('anee', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "statik:skip=1"], r"unknown policy 'statik'; did you mean 'static'\? known: .*"),
        (["-p", ""], r"'' has an empty part; .*"),
        (["-p", "static:skp=1"], r"static: unknown option 'skp'; did you mean 'skip'\? known: exit, protect, skip"),
        (["-p", "static:skip=one"], r"static: skip takes whole numbers separated by spaces; got 'one'"),
        (["-p", "static:skip=9"], r"static: no layer 9 to skip; the model has layers 0 to 3"),
        (["-p", "static:skip=1+random"], r".* names two layer policies; .*"),
        (["-p", "random"], r"random: say how often to skip .* or give a budget"),
        (["-b", "0"], r"budget is a share .* in \(0, 1\]; got 0\.0"),
        (["-b", "-0.5"], r"budget is a share .* in \(0, 1\]; got -0.5"),
        (["-b", "1.5"], r"budget is a share .* in \(0, 1\]; got 1.5"),
        (["-b", "nan"], r"budget is a share .* in \(0, 1\]; got nan"),
        (["-p", "static:skip=1", "-b", "0.6"], r"static: this set of layers spends 0\.7\d+ .* the budget of 0.6; .*"),
        (["-n", "0"], r"--max-new-tokens is a whole number, at least 1 and at most 2,147,483,647; got 0"),
        (["--dtype", "bf16"], r"unknown dtype 'bf16'; did you mean 'bfloat16'\? .*"),
        (["--device", "cuda:99"], r"device 'cuda:99' cannot be used: .+"),
        (["--device", "toaster"], r"device 'toaster' cannot be used: .+"),
        (["--device", "hpu"], r"device 'hpu' cannot be used: .+"),
        (["--prefill", "sparse"], r"prefill is 'auto', 'adaptive' or 'dense'; got 'sparse'"),
        (["--sample", "--temperature", "0"], r"--temperature is a number, at least 1e-20 and at most 1e\+20; got 0\.0"),
        (
            ["-p", "heuristic:protect=1 1", "--calibration-text", "no.txt"],
            r"cannot read the calibration text no.txt: .+",
        ),
    ],
)
def test_wrong_option_is_one_readable_line(run_anee, llama_folder, options, message):
    line = refused(run_anee("generate", llama_folder, "Hello", "-n", 3, *options))
    assert re.fullmatch(message, line), line


def test_budget_that_cannot_be_met_names_the_least_that_can(run_anee, llama_folder):
    def generate(budget):
        return run_anee("generate", llama_folder, "Hello", "-p", "random:protect=1 1", "-n", 3, "-b", budget)

    line = refused(generate(0.2))
    least = float(re.fullmatch(r"a budget of 0.2 cannot be met: the least possible is ([\d.]+) .*", line)[1])
    assert 0.5 < least < 0.7
    assert "the least possible" in refused(generate(least - 0.002))
    assert generate(least + 0.001).code == 0


def test_unknown_model_is_one_readable_line(run_anee):
    line = refused(run_anee("generate", "no-such-model", "Hello"))
    assert re.fullmatch(r"cannot find the model 'no-such-model': it is no local folder, .*; model sources: .+", line)


def test_folder_without_a_model_is_one_readable_line(run_anee, tmp_path):
    line = refused(run_anee("generate", tmp_path, "Hello"))
    assert line == f"'{tmp_path}' is no model folder: it has no config.json"


def test_empty_prompt_is_one_readable_line(run_anee, llama_folder):
    assert refused(run_anee("generate", llama_folder, "")) == "the prompt is empty; give at least one word"


def test_prompt_longer_than_the_context_is_one_readable_line(run_anee, tiny_gpt2, word_tokenizer, tmp_path):
    for part in (tiny_gpt2, word_tokenizer):
        part.save_pretrained(tmp_path)
    line = refused(run_anee("generate", tmp_path, "x" * 200))
    expected = "position 248 lies beyond the model's context of 64 tokens: shorten the prompt or lower max_new_tokens"
    assert line == expected


def test_weights_that_are_no_numbers_are_one_readable_line(run_anee, spoilt):
    edit_weights(spoilt, lambda weights: weights["model.layers.2.mlp.up_proj.weight"].view(-1)[7:8].fill_(float("nan")))
    line = refused(run_anee("generate", spoilt, "Hello"))
    assert line.startswith(
        "weight 'model.layers.2.mlp.up_proj.weight' holds NaN or infinity; the checkpoint is corrupt"
    )


def test_checkpoint_that_lacks_a_weight_is_refused_rather_than_filled_at_random(run_anee, spoilt):
    edit_weights(spoilt, lambda weights: weights.pop("model.layers.2.mlp.up_proj.weight"))
    line = refused(run_anee("generate", spoilt, "Hello"))
    assert f"the checkpoint of '{spoilt}' lacks the weight 'model.layers.2.mlp.up_proj.weight'" in line


def test_truncated_weights_are_one_readable_line(run_anee, spoilt):
    file = spoilt / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    line = refused(run_anee("generate", spoilt, "Hello"))
    assert line.startswith(f"the model '{spoilt}' cannot be loaded: ")


def test_missing_weights_are_one_readable_line(run_anee, spoilt):
    (spoilt / "model.safetensors").unlink()
    line = refused(run_anee("generate", spoilt, "Hello"))
    assert line.startswith(f"the model '{spoilt}' cannot be loaded: ")
    assert "model.safetensors" in line


@pytest.mark.parametrize(
    "config",
    ["{", "{}", "[]", '{"model_type": "no_such_family"}', '{"model_type": "llama", "hidden_size": "wide"}'],
)
def test_config_that_makes_no_sense_is_one_readable_line(run_anee, spoilt, config):
    (spoilt / "config.json").write_text(config)
    line = refused(run_anee("generate", spoilt, "Hello"))
    assert line.startswith(f"the model in '{spoilt}' cannot be read: ")


def test_family_without_an_adapter_is_one_readable_line(run_anee, tmp_path):
    config = BertConfig(vocab_size=97, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    line = refused(run_anee("generate", tmp_path, "Hello"))
    assert re.fullmatch(r"no adapter for the model family 'bert', and as it looks it cannot be run: .+", line)


def test_folder_without_a_tokenizer_is_one_readable_line(run_anee, tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    line = refused(run_anee("generate", tmp_path, "Hello"))
    assert line.startswith("text needs a tokenizer")


def test_corrupt_saved_policy_is_one_readable_line(run_anee, llama_folder, tmp_path):
    anee.load(llama_folder, "static:skip=2").policy.save(tmp_path)
    (tmp_path / "policy.json").write_text("{")
    line = refused(run_anee("generate", llama_folder, "Hello", "-p", tmp_path))
    assert line.startswith(f"the policy in {tmp_path} is corrupt")


def test_clash_of_plugins_is_one_readable_line(run_anee, install, llama_folder):
    source = """
        from anee_core.controllers.dense import DenseController
        from anee_core.hookspecs import hookimpl

        @hookimpl
        def anee_controllers():
            return {"mine": DenseController}
    """
    install("first-plugin", source)
    install("second-plugin", source)
    line = refused(run_anee("generate", llama_folder, "Hello", "-p", "mine"))
    assert "first-plugin 1.0" in line
    assert "second-plugin 1.0" in line


@pytest.mark.parametrize(
    "arguments",
    [["generate"], ["generate", "m", "p", "--budget", "half"], ["generate", "m", "p", "--nonsense"], ["compute"]],
)
def test_wrong_usage_shows_the_usage(run_anee, arguments):
    outcome = run_anee(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.errors[0].startswith("Usage: ")
    assert "Traceback" not in outcome.err


def test_debug_lets_the_error_through_with_its_cause(monkeypatch):
    from anee.cli import main

    monkeypatch.setattr(sys, "argv", ["anee", "--debug", "generate", "no-such-model", "Hello"])
    with pytest.raises(anee.AneeError, match="cannot find the model") as caught:
        main()
    assert isinstance(caught.value.__cause__, OSError)


def test_interruption_ends_quietly(run_anee, monkeypatch, llama_folder):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("anee_core.load.load", interrupt)
    outcome = run_anee("generate", llama_folder, "Hello")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert len(outcome.errors) <= 1


def test_picture_without_matplotlib_says_what_to_install(monkeypatch, tiny_llama, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model = anee.load(tiny_llama, "static:skip=1")
    model(torch.arange(2, 7)[None])
    with pytest.raises(MissingPackageError, match=r"pip install 'anee\[plot\]'") as caught:
        model.last_trace.plot(str(tmp_path / "trace.png"))
    assert isinstance(caught.value, anee.AneeError)
    assert isinstance(caught.value, ImportError)
    assert not list(tmp_path.iterdir())
