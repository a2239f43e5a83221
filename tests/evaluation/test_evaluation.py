"""Figures of a policy on a text are those that one gets by hand."""

import math

import pytest
import torch

import anee
from anee_core.errors import InputError
from anee_core.evaluation import dense_logits, dense_perplexity, text_blocks, text_quality


@pytest.fixture
def blocks():
    return torch.randint(3, 97, (3, 24), generator=torch.Generator().manual_seed(0))


def by_hand(network, model, blocks, first):
    nats, apart, same = [], [], []
    for row in blocks:
        with torch.no_grad():
            p = network(row[None]).logits[0].double().softmax(-1)
            q = model(row[None]).logits[0].double().softmax(-1)
        for t in range(first, len(row)):
            before = t - 1
            nats.append(-float(q[before, row[t]].log()))
            apart.append(float((p[before] * (p[before] / q[before]).log()).sum()))
            same.append(float(p[before].argmax() == q[before].argmax()))
    return tuple(sum(x) / len(x) for x in (nats, apart, same))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("first", [1, 9])
def test_figures_are_those_of_the_definitions(tiny_llama, blocks, batch, first):
    model = anee.load(tiny_llama, "random:p=0.4,protect=1 1+window:sinks=1,recent=6")
    dense = dense_logits(model, blocks, first, batch)
    found = text_quality(model, blocks, first, batch, dense)
    plain = text_quality(anee.load(tiny_llama), blocks, first, batch)
    assert dense_perplexity(dense, blocks, first, batch) == pytest.approx(plain.perplexity, rel=1e-5)
    nats, apart, same = by_hand(tiny_llama, model, blocks, first)
    assert found.perplexity == pytest.approx(math.exp(nats), rel=1e-4)
    assert found.divergence == pytest.approx(apart, rel=1e-3)
    assert found.agreement == pytest.approx(same, abs=1e-6)
    traces = [model(row[None]) and model.last_trace for row in blocks]
    assert found.spent == pytest.approx(
        sum(trace.budget_spent for trace in traces) / 3, abs=5e-3
    )  # of sums, not of tokens
    assert found.skipped == pytest.approx(1 - sum(trace.layers_run for trace in traces) / 3, abs=1e-6)
    # Of t earlier tokens, at most the first and five recent ones beside the token itself are held.
    held = sum(min(t, 6) for t in range(first, 24)) / sum(range(first, 24))
    assert found.dropped == pytest.approx(1 - held)


def test_without_a_dense_model_nothing_is_compared(tiny_llama, blocks):
    found = text_quality(anee.load(tiny_llama), blocks)
    assert math.isnan(found.divergence)
    assert math.isnan(found.agreement)
    assert found.dropped == pytest.approx(0)
    assert found.skipped == 0


def test_text_is_cut_into_blocks_and_wikitext_reads_like_text(llama_folder, tmp_path):
    model = anee.load(llama_folder)
    path = tmp_path / "wiki.txt"
    path.write_text("It cost 1 @,@ 000 . 5 for a well @-@ known 2 @.@ 5 " * 3)
    blocks = text_blocks(model, path, 10, 4)
    assert blocks.shape == (4, 10)
    assert model.tokenizer.decode(blocks.flatten()) == "It cost 1,000 . 5 for a well-known 2.5 It cost 1"[:40]


def test_bad_input_says_what_to_do(llama_folder, tiny_llama, blocks, tmp_path):
    model = anee.load(llama_folder)
    with pytest.raises(InputError, match="there is no text file"):
        text_blocks(model, tmp_path / "none.txt", 10, 1)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(InputError, match="5 tokens are fewer than 1 blocks of 10"):
        text_blocks(model, tmp_path / "short.txt", 10, 1)
    with pytest.raises(InputError, match="needs a tokenizer"):
        text_blocks(anee.load(tiny_llama), tmp_path / "short.txt", 10, 1)
    with pytest.raises(InputError, match=r"lies in \[1, 24\)"):
        text_quality(model, blocks, first=24)
