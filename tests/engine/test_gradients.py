"""Gradients of adaptive forwards: against finite differences, against rows alone, and where there can be none."""

import pytest
import torch
from tiny import FEW, POLICIES, SEVEN, adaptive, build, gate_weights, ragged, tokens

from anee_core.errors import InputError

LENGTHS = (9, 14, 5)
# One that reads its own output goes token by token, and has none.
TRAINABLE = {name: given for name, given in POLICIES.items() if "heuristic" not in given[0]}


@pytest.fixture
def gate(tmp_path):
    for weights in gate_weights():
        weights.save(tmp_path)
    return f"gate:{tmp_path},protect=0 0,first=1+shortcuts:{tmp_path}", 0.6


def weighted(model, ids, mask, weights):
    """Return a loss: the logits [B, T, V] of real tokens, each times its weight."""
    return (model(ids, attention_mask=mask).logits * weights * mask[..., None]).sum()


def weights_for(ids, network):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*ids.shape, network.config.vocab_size, generator=generator, dtype=network.dtype)


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def equals_finite_differences(network, policy, budget):
    """Compare the slope of a loss along a random direction with a difference quotient."""
    model = adaptive(network, policy, budget)
    ids, mask = ragged(LENGTHS, "left")
    weights = weights_for(ids, network)
    found = gradients(network, weighted(model, ids, mask, weights))
    generator = torch.Generator().manual_seed(1)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in network.named_parameters()}
    slope = sum(float((found[name] * direction[name]).sum()) for name in found)
    step, losses = 1e-6, []
    with torch.no_grad():
        for move in (step, -2 * step):
            for name, parameter in network.named_parameters():
                parameter.add_(direction[name], alpha=move)
            losses.append(float(weighted(model, ids, mask, weights)))
    assert slope == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("policy", TRAINABLE)
def test_gradients_equal_finite_differences(policy):
    # All in double precision, as the norms of other families are not.
    equals_finite_differences(build("gpt2", dtype=torch.float64), *TRAINABLE[policy])


@pytest.mark.parametrize("family", ["gptj", "falcon-multi-query", "opt"])
def test_gradients_of_skipping_and_dropping_equal_finite_differences(family):
    equals_finite_differences(build(family, dtype=torch.float64), *POLICIES["random and tova"])


def has_the_sum_of_the_gradients_of_its_rows(network, policy, budget):
    """Compare the gradients of a padded batch with those of its rows alone."""
    model = adaptive(network, policy, budget)
    ids, mask = ragged(LENGTHS, "left")
    weights = weights_for(ids, network)
    batch = gradients(network, weighted(model, ids, mask, weights))
    alone = dict.fromkeys(batch, 0.0)
    for row, length in enumerate(LENGTHS):
        one = slice(row, row + 1), slice(ids.shape[1] - length, None)
        for name, gradient in gradients(network, weighted(model, ids[one], mask[one], weights[one])).items():
            alone[name] = alone[name] + gradient
    for name, gradient in batch.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradient, alone[name], rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("policy", TRAINABLE)
@pytest.mark.parametrize("family", FEW)
def test_a_batch_has_the_sum_of_the_gradients_of_its_rows(family, policy):
    has_the_sum_of_the_gradients_of_its_rows(build(family), *TRAINABLE[policy])


@pytest.mark.parametrize("family", FEW)
def test_so_it_has_under_a_gate_with_shortcuts(family, gate):
    has_the_sum_of_the_gradients_of_its_rows(build(family), *gate)


@pytest.mark.parametrize("family", FEW)
def test_long_sequences_pass_gradients_to_all_their_tokens(family):
    network, ids = build(family), tokens(1, 24)
    mask, found = torch.ones_like(ids), []
    for chunk in (5, 256):  # what is read at once
        model = adaptive(network, "window:sinks=1,recent=8", prefill_chunk=chunk)
        found.append(gradients(network, weighted(model, ids, mask, weights_for(ids, network))))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


def test_what_is_read_token_by_token_has_no_gradient():
    model, ids = adaptive(build("gpt2"), "heuristic:protect=1 1", 0.7), tokens()
    loss = model(ids, labels=ids).loss  # by itself, nothing is wrong with it
    with pytest.raises(InputError, match="no gradient can be had from a sequence that was read in pieces"):
        loss.backward()


def training(family, checkpointing=None):
    network = build(family).train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    network.enable_input_require_grads()
    if checkpointing is not None:
        network.gradient_checkpointing_enable(checkpointing)
    return network


@pytest.mark.parametrize("policy", ["dense", "static:skip=1 3", "window:sinks=1,recent=4"])
@pytest.mark.parametrize("family", SEVEN)
def test_gradient_checkpointing_changes_no_gradient(family, policy):
    ids, found = tokens(), []
    for checkpointing in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        network = training(family, checkpointing)
        output = adaptive(network, policy)(ids, labels=ids)
        # Layers that will run again write into no cache.
        assert (output.past_key_values is None) == (checkpointing is not None)
        found.append(gradients(network, output.loss))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], found[0][name]) for name in other)


@pytest.mark.parametrize("policy", ["random:p=0.4,protect=0 0", "tova:keep=5", "h2o:keep=0.5", "knorm:keep=0.5"])
@pytest.mark.parametrize("family", FEW)
def test_gradient_checkpointing_is_refused_where_layers_need_their_cache(family, policy):
    model = adaptive(training(family, {"use_reentrant": False}), policy)
    with pytest.raises(InputError, match="cannot be trained with gradient checkpointing"):
        model(tokens())
    model.eval()
    model(tokens())  # nothing runs again


def test_gradient_checkpointing_goes_on_in_no_cache():
    model = adaptive(training("llama", {"use_reentrant": False}))
    cache = model.eval()(tokens()).past_key_values
    model.train()
    with pytest.raises(InputError, match="cannot be trained with gradient checkpointing"):
        model(tokens(), past_key_values=cache)
