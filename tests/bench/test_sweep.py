"""A sweep measures every policy at every budget once, keeps what it has, and draws it."""

import json

import pytest

import anee
from anee_core.bench.options import SweepOptions
from anee_core.bench.records import Records, ending
from anee_core.bench.sweep import relative, run_sweep
from anee_core.errors import InputError, OutputError
from anee_core.evaluation import dense_logits, text_blocks, text_quality

SMALL = SweepOptions((0.7, 0.9), length=120, blocks=2, repeats=0)
POLICIES = ["random:protect=1 1", "window:sinks=1,keep={budget},least=1"]


def test_records_are_what_the_policies_do(llama_folder, text, tmp_path):
    name = str(llama_folder)
    records = run_sweep([name], POLICIES, {"nights": text}, tmp_path / "out", SMALL)
    assert [(r["policy"], r["budget"]) for r in records] == [
        ("dense", 1.0), *((policy, budget) for policy in POLICIES for budget in (0.7, 0.9))
    ]  # fmt: skip
    model = anee.load(name, POLICIES[0], 0.7)
    blocks = text_blocks(model, text, 120, 2)
    wanted = text_quality(model, blocks, dense=dense_logits(model, blocks))
    assert records[1]["perplexity"] == pytest.approx(wanted.perplexity)
    assert records[1]["spent"] == pytest.approx(wanted.spent)
    assert records[1]["divergence"] == pytest.approx(wanted.divergence)
    assert records[1]["dropped"] == pytest.approx(0)
    assert records[3]["dropped"] > records[4]["dropped"] > 0
    dense, *others = relative(records)
    assert dense["quality"] == dense["kv"] == 1
    assert others[2]["kv"] < others[3]["kv"]
    assert "time" not in dense


def test_what_was_measured_is_not_measured_again(llama_folder, text, tmp_path):
    arguments = ([str(llama_folder)], POLICIES[:1], {"nights": text}, tmp_path / "out")
    run_sweep(*arguments, SMALL)
    file = tmp_path / "out.json"
    kept = json.loads(file.read_text())
    for record in kept["records"].values():
        record["perplexity"] = 7.0
    file.write_text(json.dumps(kept))
    assert {r["perplexity"] for r in run_sweep(*arguments, SMALL)} == {7.0}
    with pytest.raises(InputError, match="length was 120, is 24"):
        run_sweep(*arguments, SweepOptions((0.7, 0.9), length=24, blocks=2, repeats=0))
    file.write_text('{"records": ')
    with pytest.raises(InputError, match="holds no measurements"):
        run_sweep(*arguments, SMALL)


def test_command_line(llama_folder, text, tmp_path, run_anee):
    options = ["--text", f"nights={text}", "--out", tmp_path / "out", "--budgets", "0.2,0.9", "--length", "24"]
    small = ["--blocks", "1", "--tokens", "2", "--repeats", "1"]
    done = run_anee("sweep", llama_folder, "--policy", "static:protect=1 1", *options, *small)
    assert done.code == 0, done.err
    assert "left out" in done.err  # 0.2 is out of reach
    assert (tmp_path / "out.png").stat().st_size > 10_000
    records = json.loads((tmp_path / "out.json").read_text())["records"].values()
    # With two protected layers at either end, random has none of four left to skip.
    assert {r["policy"] for r in records} == {"dense", "static:protect=1 1", "window:sinks=4,keep={budget}"}
    assert all(r["ms_per_token"] > 0 and r["time"] > 0 for r in records)


def test_bad_input_says_what_to_do(llama_folder, text, tmp_path, run_anee):
    with pytest.raises(InputError, match=r"budgets is a number, above 0 and at most 1; got 1\.5"):
        SweepOptions((1.5,))
    with pytest.raises(InputError, match="at least 1"):
        SweepOptions(blocks=0)
    done = run_anee("sweep", llama_folder, "-p", "random", "--text", str(text), "--out", tmp_path / "out")
    assert "a text is NAME=FILE" in done.err
    binary, file = tmp_path / "binary.txt", tmp_path / "file"
    binary.write_bytes(b"\xff\xfe\x00 no text")
    file.touch()
    with pytest.raises(InputError, match=r"cannot read the text .*binary\.txt"):
        text_blocks(anee.load(llama_folder), binary, 8, 1)
    with pytest.raises(OutputError, match=r"cannot write .*file/out\.json"):
        Records(file / "out.json", {})


def test_a_dot_in_a_name_is_no_ending(tmp_path):
    assert ending(tmp_path / "run-0.5", ".json") == tmp_path / "run-0.5.json"
    assert ending(tmp_path / "run.json", ".png") == tmp_path / "run.png"
    records = Records(tmp_path / "run.json", {"a": 1})
    records.add("key", {"b": 2})
    assert Records(tmp_path / "run.json", {"a": 1}).all() == [{"b": 2}]
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["run.json"]
