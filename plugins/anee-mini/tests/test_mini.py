"""The model is in the package: it loads by its name, reads English, and what was trained for it works on it."""

from pathlib import Path

import anee_mini
import pytest
from anee_mini.source import WEIGHTS, load_mini

import anee
from anee_core.evaluation import text_quality
from anee_core.plugins import Plugins

# Written for this test; no book has it.
STORY = (
    "The old man sat by the fire and looked at the boy. He had walked all day through the rain, and his coat was wet. "
    '"Where is your father?" he asked. "He went to the town this morning," said the boy, "and he will not come back '
    'before night." The old man shook his head. It was a long way to the town, and the road was bad. After a while he '
    "rose, took his stick from behind the door, and went out into the dark without another word. The boy ran to the "
    "window and saw him go down the hill, with his hand upon the wall, until he was lost among the trees. "
)


@pytest.fixture(scope="module")
def mini():
    return anee.load("mini")


@pytest.fixture(scope="module")
def story(mini):
    return mini.tokenizer(STORY, return_tensors="pt")["input_ids"]


def test_the_source_is_registered():
    assert Plugins.discover().model_sources["mini"] is load_mini


def test_the_package_is_small_and_the_model_a_gpt2(mini):
    assert 10e6 < (WEIGHTS / "model.safetensors").stat().st_size < 25e6
    assert mini.config.model_type == "gpt2"
    assert mini.config.anee_backbone == next(iter(anee_mini.anee_trained_policies())).split("/")[0]
    assert all(Path(folder).is_dir() for folder in anee_mini.anee_trained_policies().values())


def test_it_expects_english(mini, story):
    assert text_quality(mini, story).perplexity < 60
    assert text_quality(mini, story.flip(1)).perplexity > 1000


def test_it_continues_a_text(mini):
    result = mini.generate("The old man", max_new_tokens=20)
    assert result.text.startswith("The old man")
    assert result.trace.budget_spent == pytest.approx(1.0)


def test_asa_was_trained_for_it(mini, story):
    dense = text_quality(mini, story, first=64)
    sparse = text_quality(anee.load(mini.model, "asa"), story, first=64)
    window = text_quality(anee.load(mini.model, f"window:keep={1 - sparse.dropped:.3f}"), story, first=64)
    assert sparse.dropped > 0.4
    assert sparse.perplexity < 1.05 * dense.perplexity
    assert sparse.perplexity < window.perplexity


def test_rl_was_trained_for_it(mini, story):
    dense = text_quality(mini, story)
    trained = text_quality(anee.load(mini.model, "rl", budget=0.6), story)
    chance = text_quality(anee.load(mini.model, "random", budget=0.6), story)
    assert trained.spent == pytest.approx(0.6, abs=0.06)
    assert dense.perplexity < trained.perplexity < chance.perplexity
