"""The native step on several threads, and with sizes that fill vectors and leave rests."""

import pytest
import torch
from tiny import adaptive, stepwise, tokens
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import anee
from anee_core.cache_policies.asa import AsaCachePolicy, AsaWeights
from anee_core.controllers.gate import GateController, GateWeights
from anee_core.errors import CacheError, InputError
from anee_core.policy import LowRankShortcut, Policy, ShortcutWeights
from anee_core.steps.native import layers

LAYERS = 4


def llama(head_dim, heads=4, kv_heads=2, inner=72):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=heads * head_dim, intermediate_size=inner, num_hidden_layers=LAYERS,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, initializer_range=0.08,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2(width, heads):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_embd=width, n_head=heads, n_layer=LAYERS, n_positions=128, initializer_range=0.08,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


NETWORKS = {
    "llama, heads of 20": lambda: llama(20),
    "llama, heads of 64": lambda: llama(64),
    "llama, heads of 80": lambda: llama(80, heads=3, kv_heads=1, inner=100),
    "llama, heads of 128": lambda: llama(128, heads=2, kv_heads=2),
    "gpt2, heads of 16": lambda: gpt2(48, 3),
    "gpt2, heads of 64": lambda: gpt2(192, 3),
}


def policies(width):
    """Return layer and token policies with weights: a gate with shortcuts, and interactions of several ranks."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    budgets, shares = torch.tensor([0.2, 1.0]), torch.stack((torch.full((LAYERS,), 0.7), torch.zeros(LAYERS)))
    gate = GateWeights(
        drawn(LAYERS, width) * width**-0.5, *(torch.zeros(2, LAYERS)), torch.ones(LAYERS), budgets, shares
    )
    shortcut = ShortcutWeights(
        drawn(LAYERS, 20, width) * 0.05, drawn(LAYERS, width, 20) * 0.2, drawn(LAYERS, width) * 0.1
    )
    found = {
        "dense": Policy(),
        "gate": Policy(GateController.of(gate, protect=(1, 0)), shortcut=LowRankShortcut.of(shortcut), budget=0.8),
    }
    for rank in (16, 21, 64):
        weights = AsaWeights(drawn(LAYERS, rank, width), drawn(LAYERS, rank, width), torch.full((LAYERS,), width * 1.5))
        found[f"asa of rank {rank}"] = Policy(cache_policy=AsaCachePolicy.of(weights))
    return found


@pytest.fixture
def three_threads(monkeypatch):
    """Let every layer be worked on by three threads, however small it is."""
    monkeypatch.setattr(layers, "_BYTES_PER_THREAD", 1)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("batch", [1, 5])
def test_all_sizes_on_three_threads(name, batch, three_threads):
    network, ids = NETWORKS[name](), tokens(batch, 25)
    for chosen, policy in policies(network.config.hidden_size).items():
        fast, slow = (adaptive(network, policy, fast=fast) for fast in (True, False))
        with torch.no_grad():
            found, wanted = stepwise(fast, ids), slow(ids).logits
        assert fast.slow_because is None
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
        assert torch.equal(fast.last_trace.kept, slow.last_trace.kept)
        if "asa" in chosen:
            assert 2 < fast.last_trace.kept.float().mean() < 23


@pytest.mark.parametrize("name", ["llama, heads of 80", "gpt2, heads of 64"])
def test_bfloat16_in_blocks_and_alone(name, three_threads):
    network, ids = NETWORKS[name]().bfloat16(), tokens(1, 7)
    fast, slow = (adaptive(network, fast=fast) for fast in (True, False))
    with torch.no_grad():
        wanted = slow(ids).logits.float()
        for found in (fast(ids).logits, stepwise(fast, ids)):  # seven tokens multiply in pairs, one does not
            torch.testing.assert_close(found.float(), wanted, atol=0.06, rtol=0.03)


@pytest.mark.parametrize(("first", "then"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_policy_follows_its_model_to_another_dtype(first, then):
    network, width = NETWORKS["llama, heads of 20"](), 80
    weights = AsaWeights(torch.zeros(LAYERS, 16, width), torch.zeros(LAYERS, 16, width), torch.tensor([1.0, -1, 1, -1]))
    model = anee.load(network.to(first), Policy(cache_policy=AsaCachePolicy.of(weights)))
    model.decode(tokens(2, 5), max_new_tokens=4)
    model.to(then)
    with torch.no_grad():
        found = stepwise(model, tokens(2, 9))
        assert model.last_trace.kept.tolist() == [[9, 9], [1, 1]] * 2
        torch.testing.assert_close(
            found, stepwise(adaptive(network, model.policy, fast=False), tokens(2, 9)), atol=0.06, rtol=0.03
        )


def test_caches_of_others_are_refused():
    network, ids = llama(20), tokens(1, 4)
    cache = anee.load(network)(ids).past_key_values
    deep = llama(20)
    deep.model.layers = deep.model.layers[:3]
    with torch.no_grad(), pytest.raises(InputError, match="the cache is for 4 layers and the model has 3"):
        anee.load(deep)(ids[:, :1], past_key_values=cache)
    for other in (llama(64), llama(20).bfloat16(), llama(20, kv_heads=4)):
        cache = anee.load(network)(ids).past_key_values
        with torch.no_grad(), pytest.raises(CacheError, match="start a new cache for another model, dtype or policy"):
            anee.load(other)(ids[:, :1], past_key_values=cache)
    found = policies(80)
    model = adaptive(network, found["asa of rank 16"])
    with torch.no_grad():
        cache = model(ids).past_key_values
        other = adaptive(network, found["asa of rank 64"])
        for block in (ids[:, :1], ids):
            with pytest.raises(CacheError, match="interaction_key"):
                other(block, past_key_values=cache)
