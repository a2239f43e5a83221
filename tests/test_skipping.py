"""SKIP and EXIT: hidden states, keys and values, order of tokens, rows of a batch."""

import copy

import pytest
import torch
from tiny import FAMILIES, POLICIES, adaptive, build, ragged, stepwise, tokens
from transformers.cache_utils import DynamicCache

from anee_core.cache import AdaptiveCache
from anee_core.interfaces import CachePolicy

CLOSE = {"atol": 5e-5, "rtol": 1e-3}


def without_layers(model, removed):
    """Return a transformers model from which layers have been taken out."""
    smaller = copy.deepcopy(model)
    decoder = smaller.base_model
    name = "h" if hasattr(decoder, "h") else "layers"
    kept = [layer for i, layer in enumerate(getattr(decoder, name)) if i not in removed]
    for i, layer in enumerate(kept):
        (layer.attn if hasattr(layer, "attn") else layer.self_attn).layer_idx = i
    setattr(decoder, name, torch.nn.ModuleList(kept))
    smaller.config.num_hidden_layers = len(kept)
    if getattr(smaller.config, "layer_types", None):
        smaller.config.layer_types = [t for i, t in enumerate(smaller.config.layer_types) if i not in removed]
    return smaller


@pytest.mark.parametrize("removed", [(2,), (0, 5), (1, 2, 3), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_a_layer_for_all_tokens_is_the_model_without_it(family, removed):
    model, ids = build(family), tokens()
    ours = adaptive(model, f"static:skip={' '.join(map(str, removed))}")
    theirs = without_layers(model, removed)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        generated = ours.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(generated, theirs.generate(ids, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 7])
def test_skipped_layer_caches_what_it_would_have_cached(family, length):
    """The layer's own norm, projection and positions: taken from the layer itself, run on the same input."""
    model = build(family)
    ids = tokens(length=9)
    ours = adaptive(model, "static:skip=2 3")
    with torch.no_grad():
        cache = ours.new_cache()
        if length < 9:
            ours(ids[:, :-length], past_key_values=cache)
        output = ours(ids[:, -length:], past_key_values=cache, output_hidden_states=True)
        call = ours.adapter.begin(
            ours.parts, output.hidden_states[0], torch.arange(9 - length, 9).expand(ids.shape[0], -1)
        )
        for layer in (2, 3):
            taken = DynamicCache()  # without a config: it keeps all tokens, whatever the window
            arguments = ours.adapter.layer_arguments(call, taken)
            arguments["attention_mask"] = torch.zeros(1, 1, length, length)
            ours.parts.layers[layer](output.hidden_states[layer], **arguments)
            keys, values = cache.held(layer)
            torch.testing.assert_close(keys[:, :, -length:], taken.layers[layer].keys)
            torch.testing.assert_close(values[:, :, -length:], taken.layers[layer].values)


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_projection_agrees_with_the_layer_itself(family):
    model = adaptive(build(family))
    adapter, parts = model.adapter, model.parts
    hidden_states = torch.randn(2, 5, 32)
    call = adapter.begin(parts, hidden_states, torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]]))
    for layer in parts.layers:
        fast, captured = adapter.project_kv(layer, hidden_states, call), adapter.capture_kv(layer, hidden_states, call)
        for a, b in zip(fast, captured, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("leave", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_exit_is_skipping_all_later_layers_and_keeps_caches_aligned(family, leave):
    model, ids = build(family), tokens()
    leaving = adaptive(model, f"static:exit={leave}")
    skipping = adaptive(model, f"static:skip={' '.join(str(i) for i in range(leave, 6))}")
    output = leaving(ids)
    assert torch.equal(output.logits, skipping(ids).logits)
    cache = output.past_key_values
    assert {cache.held(i)[0].shape[2] for i in range(6)} == {ids.shape[1]}
    # The next token runs densely over what the exits left behind.
    dense = adaptive(model)
    assert torch.isfinite(dense(ids[:, :1], past_key_values=cache).logits).all()
    assert cache.get_seq_length() == ids.shape[1] + 1


def test_protected_layers_run_even_after_an_exit():
    model = adaptive(build("llama"), "static:exit=2,protect=1 2")
    model(tokens())
    assert model.last_trace.ran[:, 0, 0].tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
class TestEveryPolicy:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_parallel_equals_stepwise(self, family, policy, attention):
        name, budget = POLICIES[policy]
        model, ids = adaptive(build(family, attention), name, budget), tokens(length=13)
        with torch.no_grad():
            whole = model(ids).logits
            ran = model.last_trace.ran
            cache, parts, stepped = model.new_cache(), [], []
            for t in range(ids.shape[1]):
                parts.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
                stepped.append(model.last_trace.ran)
        assert torch.equal(ran, torch.cat(stepped, dim=2))
        torch.testing.assert_close(whole, torch.cat(parts, dim=1), **CLOSE)

    def test_chunks_equal_the_whole(self, family, policy):
        name, budget = POLICIES[policy]
        model, ids = adaptive(build(family), name, budget), tokens(length=13)
        with torch.no_grad():
            whole = model(ids).logits
            cache = model.new_cache()
            parts = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 4, 3], dim=1)]
        torch.testing.assert_close(whole, torch.cat(parts, dim=1), **CLOSE)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_rows_of_a_padded_batch_are_what_they_are_alone(self, family, policy, side):
        name, budget = POLICIES[policy]
        model = adaptive(build(family), name, budget)
        lengths = [4, 12, 1, 7]
        ids, mask = ragged(lengths, side, extra=1)
        with torch.no_grad():
            batched = model(ids, attention_mask=mask).logits
            ran = model.last_trace.ran
            for row in range(len(lengths)):
                real = mask[row].bool()
                alone = model(ids[row, real][None]).logits[0]
                torch.testing.assert_close(batched[row, real], alone, **CLOSE)
                assert torch.equal(ran[:, row, real], model.last_trace.ran[:, 0])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_rows_generate_what_they_generate_alone(self, family, policy, side):
        name, budget = POLICIES[policy]
        model = adaptive(build(family), name, budget)
        lengths = [4, 9, 1]
        ids, mask = ragged(lengths, side, extra=2)
        batched = model.decode(ids, mask, max_new_tokens=6).new_tokens
        for row in range(len(lengths)):
            alone = model.decode(ids[row, mask[row].bool()][None], max_new_tokens=6).new_tokens[0]
            assert batched[row] == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_stepwise_equals_whole(family):
    model = adaptive(build(family), "random:p=0.5,protect=0 0")
    ids, mask = ragged([4, 9, 6], "left")
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        parts = [stepwise(model, ids[r, mask[r].bool()][None]) for r in range(3)]
    for row, alone in enumerate(parts):
        torch.testing.assert_close(whole[row, mask[row].bool()], alone[0], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_keys_and_values_are_what_later_tokens_attend_to(family):
    """Disturbing what a skipped layer stored changes the output once the layer runs again."""
    model, ids = build(family), tokens(length=8)
    skipping, dense = adaptive(model, "static:skip=2 4"), adaptive(model)
    outputs = []
    for disturb in (False, True):
        cache: AdaptiveCache = skipping(ids).past_key_values
        if disturb:
            cache.held(4)[1].add_(1.0)
        with torch.no_grad():
            outputs.append(dense(tokens(length=1), past_key_values=cache).logits)
    assert not torch.allclose(*outputs, atol=1e-3)


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

        def keep(self, view):
            return torch.zeros_like(view.valid)

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
