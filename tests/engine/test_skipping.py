"""SKIP and EXIT: hidden states, keys and values, order of tokens, rows of a batch."""

import pytest
import torch
from tiny import FAMILIES, FEW, POLICIES, adaptive, build, pairwise, ragged, shared, stepwise, tokens

from anee_core.interfaces import CachePolicy

CLOSE = {"atol": 5e-5, "rtol": 1e-3}


def test_protected_layers_run_even_after_an_exit():
    model = adaptive(build("llama"), "static:exit=2,protect=1 2")
    model(tokens())
    assert model.last_trace.ran[:, 0, 0].tolist() == [True, True, False, False, True, True]


# What differs in options only, or drops by a score that needs nothing of the family, is tried on a few families.
VARIANTS = {
    "static, first and last", "random, exit", "heuristic, exit",
    "window, share", "tova, by layer", "random tokens", "random and knorm", "heuristic and h2o",
}  # fmt: skip
WHOLE, PIECES = ("stepwise", "rows"), ("chunks", "left", "right")
"""Ways to give tokens to a model; the second ones are tried on a few families."""


def some_family(family, policy, way):
    return family in FEW or (policy not in VARIANTS and way in WHOLE)


TRIED = pairwise(FAMILIES, POLICIES, (*WHOLE, *PIECES), allowed=some_family)


def given(*ways):
    """Parametrize a test by the families and policies tried with some ways, and by the way if there are several."""
    rows = [row if len(ways) > 1 else row[:2] for row in TRIED if row[2] in ways]
    return pytest.mark.parametrize(("family", "policy", "way")[: len(rows[0])], rows)


@given("stepwise")
def test_parallel_equals_stepwise(family, policy):
    name, budget = POLICIES[policy]
    model, ids = adaptive(shared(family), name, budget), tokens(length=11)
    with torch.no_grad():
        whole = model(ids).logits
        ran = model.last_trace.ran
        cache, parts, stepped = model.new_cache(), [], []
        for t in range(ids.shape[1]):
            parts.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
            stepped.append(model.last_trace.ran)
    assert torch.equal(ran, torch.cat(stepped, dim=2))
    torch.testing.assert_close(whole, torch.cat(parts, dim=1), **CLOSE)


@given("rows")
def test_rows_of_a_padded_batch_are_what_they_are_alone(family, policy):
    name, budget = POLICIES[policy]
    model = adaptive(shared(family), name, budget)
    lengths = [4, 10, 1]
    alone = []
    with torch.no_grad():
        for row, length in enumerate(lengths):
            logits = model(tokens(1, length, seed=row + 1)).logits[0]
            alone.append((logits, model.last_trace.ran[:, 0]))
        for side in ("left", "right"):
            ids, mask = ragged(lengths, side, extra=1)
            batched = model(ids, attention_mask=mask).logits
            ran = model.last_trace.ran
            for row, (logits, layers) in enumerate(alone):
                real = mask[row].bool()
                torch.testing.assert_close(batched[row, real], logits, **CLOSE)
                assert torch.equal(ran[:, row, real], layers)


@given("chunks")
def test_chunks_equal_the_whole(family, policy):
    name, budget = POLICIES[policy]
    model, ids = adaptive(shared(family), name, budget), tokens(length=13)
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.new_cache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 4, 3], dim=1)]
    torch.testing.assert_close(whole, torch.cat(parts, dim=1), **CLOSE)


@given("left", "right")
def test_padded_rows_generate_what_they_generate_alone(family, policy, way):
    name, budget = POLICIES[policy]
    model = adaptive(shared(family), name, budget)
    lengths = [4, 8, 1]
    ids, mask = ragged(lengths, way, extra=2)
    batched = model.decode(ids, mask, max_new_tokens=5).new_tokens
    for row in range(len(lengths)):
        alone = model.decode(ids[row, mask[row].bool()][None], max_new_tokens=5).new_tokens[0]
        assert batched[row] == alone


@pytest.mark.parametrize("family", FEW)
def test_padded_batch_stepwise_equals_whole(family):
    model = adaptive(build(family), "random:p=0.5,protect=0 0")
    ids, mask = ragged([4, 9, 6], "left")
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        parts = [stepwise(model, ids[r, mask[r].bool()][None]) for r in range(3)]
    for row, alone in enumerate(parts):
        torch.testing.assert_close(whole[row, mask[row].bool()], alone[0], **CLOSE)


def test_exception_inside_a_layer_leaves_the_cache_as_it_was(monkeypatch):
    model, ids = adaptive(build("llama"), "random:p=0.5,protect=0 0"), tokens(length=9)
    clean = model(ids).logits
    cache = model.new_cache()
    model(ids[:, :5], past_key_values=cache)

    def fail(*_, **__):
        raise RuntimeError("on purpose")

    broken = model.parts.layers[5]
    with monkeypatch.context() as patch:
        patch.setattr(broken, "forward", fail)
        patch.setattr(broken.self_attn.k_proj, "forward", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(ids[:, 5:], past_key_values=cache)
    assert cache.get_seq_length() == 5
    torch.testing.assert_close(model(ids[:, 5:], past_key_values=cache).logits, clean[:, 5:], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_policy_that_keeps_nothing_drops_nothing_for_padding(side):
    """A right-padded row's last real token stays, as it does when the row is alone."""

    class KeepNothing(CachePolicy):
        name = "nothing"

        @classmethod
        def option_names(cls):
            return ()

        def retain(self, view):
            return torch.zeros_like(view.valid)[:, None]

    model = adaptive(build("llama"), KeepNothing())
    ids, mask = ragged([3, 6], side)
    cache = model(ids, attention_mask=mask).past_key_values
    assert cache.kept().tolist() == [[1, 1]] * 6
    assert cache.next_positions().flatten().tolist() == [3, 6]
    step = model(tokens(1, 1).expand(2, -1), past_key_values=cache).logits
    alone = model(ids[:1, mask[0].bool()]).past_key_values
    torch.testing.assert_close(step[0], model(tokens(1, 1), past_key_values=alone).logits[0], **CLOSE)


def test_padding_in_half_precision_gives_no_nan():
    """Scores far below zero beside the smallest fp16 number: a padding query must not become NaN."""
    model = build("llama", "eager", torch.float16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    ids, mask = ragged([3, 30], "left")
    assert torch.isfinite(adaptive(model)(ids, attention_mask=mask).logits).all()
