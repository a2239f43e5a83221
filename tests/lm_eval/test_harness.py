"""lm-eval scores a model as it is deployed, from local files, and says what that took."""

import json
import math
import subprocess
import sys

import pytest
import torch
from tiny import adaptive, build

import anee
from anee.lm_eval.harness import AneeLM
from anee.lm_eval.local_tasks import find_tasks, local_task
from anee.lm_eval.options import TaskOptions
from anee.lm_eval.run_tasks import run_tasks
from anee_core.errors import InputError

POLICY = "random:p=0.4,protect=1 1+window:sinks=1,recent=6"
LAST = [{"context": "the cat saw a dog and then ran to", "continuation": word} for word in ("the", "a", "it")]
CHOICE = [
    {"query": "Question: who ran?\n", "choices": ["the cat", "a dog by night"], "gold": 1},
    {"query": "Question: who saw?\n", "choices": ["the man of the house", "he"], "gold": 0},
]
CONTEXT = [{"context_options": ["so the cat", "so a dog"], "continuation": "ran to the house.", "gold": 1}]

YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: '{{{{context}}}}'
doc_to_target: ' {{{{continuation}}}}'
metric_list: [{{metric: acc}}, {{metric: perplexity}}]
"""


pytestmark = pytest.mark.usefixtures("no_environment_report")


@pytest.fixture
def folder(tmp_path):
    for name, lines in (("last", LAST), ("choice", CHOICE), ("context", CONTEXT)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def log_likelihood(model, context, continuation):
    """By hand: of the continuation's tokens after the context's."""
    before = model.tokenizer(context)["input_ids"]
    ids = torch.tensor([before + model.tokenizer(continuation)["input_ids"]])
    with torch.no_grad():
        log_p = model(ids).logits[0].double().log_softmax(-1)
    own = log_p[len(before) - 1 : -1].gather(1, ids[0, len(before) :, None])
    return float(own.sum()), bool((log_p[len(before) - 1 : -1].argmax(-1) == ids[0, len(before) :]).all())


@pytest.mark.parametrize("batch", [1, 3])
def test_scores_are_those_of_the_definitions(llama_folder, folder, batch):
    model = anee.load(llama_folder, POLICY)
    options = TaskOptions(tasks_dir=folder, batch=batch)
    found = run_tasks(model, ["last", "choice", "context"], options=options)["tasks"]
    scores = [log_likelihood(model, line["context"], " " + line["continuation"]) for line in LAST]
    assert found["last"]["scores"]["perplexity"] == pytest.approx(math.exp(-sum(s for s, _ in scores) / 3), rel=1e-4)
    assert found["last"]["scores"]["acc"] == sum(greedy for _, greedy in scores) / 3
    right, normed = 0, 0
    for line in CHOICE:
        tried = [log_likelihood(model, line["query"] + "Answer:", " " + choice)[0] for choice in line["choices"]]
        per_letter = [score / len(choice) for score, choice in zip(tried, line["choices"], strict=True)]
        right += tried.index(max(tried)) == line["gold"]
        normed += per_letter.index(max(per_letter)) == line["gold"]
    assert found["choice"]["scores"] == {"acc": right / 2, "acc_norm": normed / 2}
    line = CONTEXT[0]
    tried = [log_likelihood(model, option, " " + line["continuation"])[0] for option in line["context_options"]]
    assert found["context"]["scores"]["acc"] == float(tried.index(max(tried)) == line["gold"])
    assert found["last"]["examples"] == 3
    assert 0 < found["last"]["spent"]["budget spent"] < 1
    assert 0 < found["last"]["spent"]["context kept"] < 1
    assert found["last"]["spent"]["FLOPs"] > 0
    assert found["last"]["spent"]["KV bytes"] > 0


def test_an_audit_that_decodes_gives_the_same(llama_folder, folder):
    model = anee.load(llama_folder, POLICY)
    options = (TaskOptions(tasks_dir=folder, mode=mode) for mode in ("parallel", "decode"))
    whole, audit = (run_tasks(model, ["last"], options=each)["tasks"] for each in options)
    assert audit["last"]["scores"] == pytest.approx(whole["last"]["scores"], rel=1e-4)
    assert audit["last"]["spent"]["context kept"] == pytest.approx(whole["last"]["spent"]["context kept"])
    # What was dropped is masked in one forward, and gone when decoding.
    assert audit["last"]["spent"]["budget spent"] < whole["last"]["spent"]["budget spent"]


def test_an_audit_decides_for_the_first_token_as_for_any_other(llama_folder):
    loaded = anee.load(llama_folder)
    model = adaptive(loaded.model, "heuristic:protect=1 1", 0.7, tokenizer=loaded.tokenizer)
    ids = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(0))
    whole, audit = (AneeLM(model, mode=mode)._model_call(ids) for mode in ("parallel", "decode"))
    torch.testing.assert_close(audit, whole, atol=1e-5, rtol=1e-4)


def test_the_audit_really_decodes(llama_folder, monkeypatch):
    model = anee.load(llama_folder, POLICY)
    lm, shapes = AneeLM(model, mode="decode"), []
    run = model.engine.run
    monkeypatch.setattr(
        model.engine, "run", lambda block, *rest: shapes.append(block.position_ids.shape) or run(block, *rest)
    )
    lm._model_call(torch.randint(3, 97, (2, 9)))
    assert shapes == [(2, 1)] * 9


def test_it_generates(llama_folder):
    model = anee.load(llama_folder, POLICY)
    lm = AneeLM(model)
    from lm_eval.api.instance import Instance

    asked = Instance("generate_until", {}, ("the cat", {"until": ["."], "max_gen_toks": 5}), 0)
    (text,) = lm.generate_until([asked])
    assert model.generate("the cat", max_new_tokens=5).text.removeprefix("the cat").startswith(text)
    assert lm.spent()["budget spent"] > 0


def test_lm_eval_finds_it_by_name():
    from importlib.metadata import entry_points

    (found,) = (point for point in entry_points(group="lm_eval.models") if point.name == "anee")
    assert found.load() is AneeLM
    from lm_eval.api.registry import get_model

    assert get_model("anee") is AneeLM
    assert get_model("hf") is not AneeLM


def test_command_line(llama_folder, folder, run_anee, tmp_path):
    options = ["--tasks", "last,choice", "--tasks-dir", folder, "--policy", "static:skip=1", "--limit", "2"]
    done = run_anee("eval", llama_folder, *options, "--json", tmp_path / "out" / "found.json")
    assert done.code == 0, done.err
    assert "acc_norm" in done.out
    found = json.loads((tmp_path / "out" / "found.json").read_text())
    assert found["policy"] == "static:skip=1"
    assert found["tasks"]["last"]["examples"] == 2


@pytest.mark.real
def test_lm_evals_own_command_line(llama_folder, folder, tmp_path):
    (folder / "last.yaml").write_text(YAML.format(name="last_word", file=folder / "last.jsonl"))
    model = json.dumps({"pretrained": str(llama_folder), "policy": "window:sinks=2,recent=8"})
    arguments = ["--model", "anee", "--model_args", model, "--device", "cpu"]
    tasks = ["--tasks", "last_word", "--include_path", str(folder), "--output_path", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-m", "anee.lm_eval", *arguments, *tasks], check=True, cwd=tmp_path)
    (found,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(found.read_text())["n-samples"]["last_word"]["effective"] == 3


def test_tasks_in_yaml_are_found_by_their_names(llama_folder, folder, run_anee, tmp_path):
    (folder / "some file.yaml").write_text(YAML.format(name="last_word", file=folder / "last.jsonl"))
    out = tmp_path / "found.json"
    done = run_anee("eval", llama_folder, "-t", "last_word,last", "--tasks-dir", folder, "-p", POLICY, "--json", out)
    assert done.code == 0, done.err
    found = json.loads(out.read_text())["tasks"]
    assert found["last_word"]["scores"] == found["last"]["scores"]
    done = run_anee("eval", llama_folder, "--tasks", folder / "some file.yaml")
    assert done.code == 2
    assert done.errors == [
        f"error: a task goes by its name; for the file '{folder / 'some file.yaml'}', "
        "name its folder: --tasks-dir FOLDER"
    ]


def test_a_policy_with_commas_is_given_as_json(llama_folder, monkeypatch, capsys):
    from anee.lm_eval.__main__ import main

    def split():
        AneeLM.create_from_arg_string(f"pretrained={llama_folder},policy=window:sinks=2,recent=8")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", split)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: no option 'recent'; if it is the policy's, give the model_args as JSON: '{")
    given = json.loads(error[error.index("'{") + 1 : -1])
    assert given == {"pretrained": str(llama_folder), "policy": "window:sinks=2,recent=8"}
    assert str(AneeLM.create_from_arg_obj(given).model.policy) == "window:sinks=2,recent=8"


def test_a_gpu_that_nobody_has_is_no_reason_to_fail(llama_folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # lm-eval's command line says "cuda" where nobody says --device.
    assert AneeLM(str(llama_folder), device="cuda").model.device.type == "cpu"


def test_bad_input_says_what_to_do(llama_folder, folder):
    with pytest.raises(InputError, match="mode is parallel or decode"):
        AneeLM(anee.load(llama_folder), mode="quick")
    with pytest.raises(InputError, match="no option 'prefil'"):
        AneeLM(str(llama_folder), prefil="dense")
    with pytest.raises(InputError, match="policy is for a model that is to be loaded; this one is, under 'dense'"):
        AneeLM(anee.load(llama_folder), policy=POLICY)
    assert AneeLM(str(llama_folder), "heuristic:protect=1 1", 0.8, hard=True, batch_size=2).model.engine.budget.hard
    with pytest.raises(InputError, match="needs a tokenizer"):
        AneeLM(anee.load(build("llama")))
    (folder / "odd.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(InputError, match="the keys of a line are those of one kind of task"):
        local_task(folder / "odd.jsonl")
    (folder / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="cannot read a task"):
        local_task(folder / "empty.jsonl")
    with pytest.raises(InputError, match="there is no folder"):
        find_tasks(["last"], folder / "none")


@pytest.mark.real
def test_a_task_that_nobody_knows(llama_folder, run_anee):
    done = run_anee("eval", llama_folder, "--tasks", "no_such_task_anywhere")
    assert done.code == 2
    assert "no task 'no_such_task_anywhere'" in done.err
