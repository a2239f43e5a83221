"""Input that cannot be right: each is one clear error, at the command line and in Python."""

import random

import pytest
import torch
from bad_calls import CALLS
from bad_lines import LINES
from tiny import adaptive, build

from anee_core.errors import AneeError

SHORT_LINES, SHORT_CALLS = 12, 60


@pytest.fixture
def small(tiny_llama, tiny_gpt2, llama_folder, word_tokenizer, tmp_path, text):
    """Return what the letters of a line stand for."""
    learned = tmp_path / "learned"
    tiny_gpt2.save_pretrained(learned)
    word_tokenizer.save_pretrained(learned)
    (tmp_path / "empty").mkdir()
    return {"M": str(llama_folder), "L": str(learned), "T": str(text), "X": str(tmp_path / "new")}


def filled(line, small):
    """Return the arguments of a line."""
    return [small.get(word, f"a={small['T']}" if word == "a=T" else word) for word in line.split()]


def told(outcome):
    """Return what is wrong with how a command refused, or nothing."""
    if outcome.code == 0:
        return "is taken"
    if "Traceback" in outcome.err + outcome.out:
        return f"ends in a traceback: {outcome.err.splitlines()[-1]}"
    if outcome.code == 2 and any(line.startswith("error: ") for line in outcome.errors):
        lines = [line for line in outcome.errors if line.startswith("error: ")]
        return "" if len(lines) == 1 and len(lines[0]) < 6000 else "says more than a line"
    return "" if "Error" in outcome.err or "Usage" in outcome.err + outcome.out else f"says nothing: {outcome}"


def test_lines_are_refused_in_one(campaign, run_anee, small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    chosen = random.Random(0).sample(LINES, SHORT_LINES)
    for i in campaign.trials("bad command lines", short=SHORT_LINES, long=len(LINES)):
        line = (LINES if campaign.long else chosen)[i]
        try:
            wrong = told(run_anee(*filled(line, small)))
        except Exception as error:
            wrong = f"raises {type(error).__name__}: {error}"
        campaign.count("refused" if not wrong else "fault")
        if wrong:
            campaign.fault(f"{line[:80]}: {wrong[:200]}")


def test_two_wrongs_are_refused_too(campaign, run_anee, small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = [line.split()[3:] for line in LINES if line.startswith("generate M hi -")]
    for seed in campaign.trials("pairs of bad options", short=2, long=200):
        pair = random.Random(seed).sample(options, 2)
        wrong = told(run_anee("generate", small["M"], "hi", *pair[0], *pair[1]))
        if wrong:
            campaign.fault(f"{pair}: {wrong}"[:300])


def wrong_with(call, model):
    """Return what is wrong with how a call refused, or nothing."""
    name, run = call
    try:
        run(model)
    except (AneeError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines()
        ours = isinstance(error, AneeError)
        if len(lines) != 1:
            return f"{name}: {len(lines)} lines: {error}"
        word = name.split("=")[0].split("(")[-1]
        return "" if ours or word in str(error) else f"{name}: {type(error).__name__}: {error}"
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}"
    return f"{name}: is taken"


def test_calls_are_refused_in_one_line(campaign, word_tokenizer, tmp_path):
    torch.manual_seed(0)
    model = adaptive(build("gpt2"), tokenizer=word_tokenizer)
    ids = torch.arange(2, 8)[None]
    expected = model.decode(ids, max_new_tokens=4).new_tokens
    chosen = random.Random(1).sample(CALLS, SHORT_CALLS)
    for i in campaign.trials("bad calls", short=SHORT_CALLS, long=len(CALLS)):
        call = (CALLS if campaign.long else chosen)[i]
        wrong = wrong_with(call, model)
        campaign.count("refused" if not wrong else "fault")
        if wrong:
            campaign.fault(wrong[:300])
        if model.decode(ids, max_new_tokens=4).new_tokens != expected:
            campaign.fault(f"{call[0]}: the model answers otherwise since")
