"""No host reads per layer, nothing left behind, models that do not meet, inputs that are refused in words."""

import copy
import threading

import pytest
import torch
from tiny import adaptive, build, ragged, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from anee_core.controllers.gate import GateController, GateWeights
from anee_core.errors import AdapterError, InputError, ModelError
from anee_core.interfaces import Layout, ModelAdapter
from anee_core.model import AdaptiveModel
from anee_core.policy import Policy


class HostReads(TorchDispatchMode):
    """Counts reads of device values: `.item()`, `bool(tensor)`, and copies that `.cpu()` and `.tolist()` would make."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("cpu", "tolist", "numpy"):
            self._watch(monkeypatch, name)

    def _watch(self, monkeypatch, name):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *arguments, **options):
            self.count += 1
            return original(tensor, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return function(*args, **(kwargs or {}))


def deep(layers):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=97, num_hidden_layers=layers, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    ).eval()


@pytest.mark.parametrize(
    ("policy", "budget"),
    [("dense", None), ("static:skip=1 2", None), ("random:p=0.5,protect=1 1", None), ("heuristic:protect=1 1", 0.7)],
)
def test_host_reads_of_a_token_do_not_grow_with_depth(policy, budget, monkeypatch):
    counts = []
    for layers in (4, 12):
        model = adaptive(deep(layers), policy, budget)
        cache = model.new_cache()
        with torch.no_grad():
            model(tokens(1, 3), past_key_values=cache)
            model(tokens(1, 1), past_key_values=cache)
            with monkeypatch.context() as patch, HostReads(patch) as reads:
                model.engine.run(_block(model, cache), cache, _trace())
        counts.append(reads.count)
    assert counts[0] == counts[1] <= 4


def gate_of(layers):
    weight = torch.randn(layers, 16, generator=torch.Generator().manual_seed(0)) / 4
    shares = torch.tensor([[0.7], [0.0]]).expand(2, layers)
    flat = torch.zeros(layers)
    return Policy(GateController.of(GateWeights(weight, flat, flat, flat + 1, torch.tensor([0.3, 1.0]), shares)))


def test_host_reads_of_a_gated_token_do_not_grow_with_depth(monkeypatch):
    counts = []
    for layers in (4, 12):
        model = adaptive(deep(layers), fast=True).set_policy(gate_of(layers), 0.8)
        cache = model.new_cache()
        with torch.no_grad():
            model(tokens(1, 3), past_key_values=cache)
            model(tokens(1, 1), past_key_values=cache)
            block = _block(model, cache)
            with monkeypatch.context() as patch:
                reads = HostReads(patch)  # not entered: in sight of a dispatch mode layers run by their modules
                for name in ("item", "nonzero", "__bool__", "__int__", "__float__"):
                    reads._watch(patch, name)
                model.engine.run(block, cache, _trace())
        assert model.slow_because is None
        counts.append(reads.count)
    assert counts[0] == counts[1] <= 4


def _block(model, cache):
    from anee_core.model.context import Context
    from anee_core.model.inputs import Inputs, read_block

    return read_block(model.parts, Inputs(tokens(1, 1)), cache, Context(model.adapter, model.parts))


def _trace():
    from anee_core.accounting import Trace

    return Trace()


def test_nothing_is_left_on_the_wrapped_model():
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    ours = adaptive(model, "random:p=0.5,protect=0 0")
    ours.generate(tokens(), max_new_tokens=4)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    ids = tokens()
    assert torch.equal(model(ids).logits, build("llama")(ids).logits)


def test_two_models_and_two_policies_on_one_model_do_not_meet():
    shared, other = build("llama"), build("gpt2")
    models = [adaptive(shared), adaptive(shared, "static:skip=1 4"), adaptive(other, "random:p=0.5,protect=0 0")]
    ids = tokens(1, 6)
    alone = [model.decode(ids, max_new_tokens=6).new_tokens for model in models]
    caches = [None] * 3
    feeds = [ids] * 3
    turns = [[] for _ in models]
    with torch.no_grad():
        for _ in range(6):
            for i, model in enumerate(models):
                output = model(feeds[i], past_key_values=caches[i])
                caches[i], feeds[i] = output.past_key_values, output.logits[:, -1:].argmax(-1)
                turns[i].append(int(feeds[i]))
    assert [[t] for t in turns] == alone


def test_two_threads_do_not_interfere():
    model = build("llama")
    jobs = [(adaptive(model, "static:skip=1 4"), tokens(1, 5, seed=1)), (adaptive(model), tokens(1, 5, seed=2))]
    expected = [m.decode(ids, max_new_tokens=20).new_tokens for m, ids in jobs]
    found = [None, None]

    def work(i):
        for _ in range(3):
            found[i] = jobs[i][0].decode(jobs[i][1], max_new_tokens=20).new_tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_failed_generation_leaves_model_and_cache_usable():
    model, ids = adaptive(build("llama"), "static:skip=2"), tokens(1, 5)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)

    def fail(input_ids, scores):
        raise RuntimeError("on purpose")

    cache = model.new_cache()
    with pytest.raises(RuntimeError, match="on purpose"):
        model.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=cache, logits_processor=[fail])
    assert not model._recordings
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "none empty"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, "none empty"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"\[batch, tokens\]"),
        ({"input_ids": tokens(1, 3), "attention_mask": torch.ones(1, 9)}, "attention_mask is"),
        ({"input_ids": tokens(1, 3), "attention_mask": torch.ones(1, 1, 3, 3)}, "attention_mask is"),
        ({"input_ids": tokens(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "row 1 .* all padding"),
        ({"input_ids": tokens(1, 3), "position_ids": torch.zeros(1, 2, dtype=torch.long)}, "position_ids is"),
        ({"input_ids": tokens(1, 3), "output_attentions": True}, "takes no 'output_attentions'"),
        ({"input_ids": torch.full((1, 3), 97)}, "token id 97"),
        ({"input_ids": torch.full((1, 3), -1)}, "token id -1"),
    ],
)
def test_wrong_input_is_refused_in_words(arguments, message):
    with pytest.raises(InputError, match=message):
        adaptive(build("llama"))(**arguments)


def test_filled_foreign_cache_is_refused():
    network, ids = build("llama"), tokens()
    cache = DynamicCache()
    network(ids, past_key_values=cache)
    with pytest.raises(InputError, match="new_cache"):
        adaptive(network)(ids, past_key_values=cache)


def test_batch_of_another_size_is_refused_by_a_filled_cache():
    from anee_core.errors import CacheError

    model = adaptive(build("llama"))
    cache = model(tokens(2)).past_key_values
    with pytest.raises(CacheError, match="holds 2 rows and got 3"):
        model(tokens(3, 1), past_key_values=cache)


def test_edge_rows_give_no_nan():
    """A row of one token beside long ones, everything skipped, everything exited."""
    ids, mask = ragged([1, 12], "left", extra=3)
    for policy in ("static:skip=0 1 2 3 4 5", "static:exit=0", "random:p=1,protect=0 0", "window:sinks=0,recent=1"):
        for family in ("gpt2", "llama"):
            assert torch.isfinite(adaptive(build(family), policy)(ids, attention_mask=mask).logits).all()


class Elsewhere(ModelAdapter):
    layout = Layout(
        layers="model.layers", final_norm="model.norm", attention="self_attn", mlp="mlp", input_norm="input_norm"
    )


def test_misspelt_path_names_what_exists():
    with pytest.raises(AdapterError, match=r"no 'input_norm' .* it has: self_attn, mlp, input_layernorm"):
        AdaptiveModel(build("llama"), Elsewhere())


def test_wrong_cache_argument_is_named():
    class Misnamed(ModelAdapter):
        layout = Layout(
            layers="model.layers",
            final_norm="model.norm",
            rotary="model.rotary_emb",
            attention="self_attn",
            mlp="mlp",
            input_norm="input_layernorm",
            cache_argument="layer_past",
        )

    with pytest.raises(AdapterError, match="never updated its cache through 'layer_past'"):
        AdaptiveModel(build("llama"), Misnamed())


def test_layer_without_a_cache_is_named():
    class Cacheless(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    class Minimal(ModelAdapter):
        layout = Layout(layers="model.layers", attention="self_attn")

    network = build("llama")
    for i, layer in enumerate(network.model.layers):
        network.model.layers[i] = Cacheless()
        network.model.layers[i].self_attn = layer.self_attn
    with pytest.raises(AdapterError, match=r"Cacheless takes none of cache, .* in Layout.cache_argument"):
        AdaptiveModel(network, Minimal())


def test_layout_with_half_a_projection_is_refused():
    with pytest.raises(AdapterError, match="both key and value"):
        Layout(layers="a", final_norm="b", attention="c", mlp="d", input_norm="e", key="f")


def test_unsupported_configs_are_refused_with_the_reason():
    model = build("gpt2")
    model.config.add_cross_attention = True
    with pytest.raises(ModelError, match="encoder"):
        adaptive(model)
    flash = build("llama")
    flash.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ModelError, match="attn_implementation='sdpa' or 'eager'"):
        adaptive(flash)


def test_offloaded_weights_are_refused():
    model = build("llama")
    model.model.layers[2].to("meta")
    with pytest.raises(ModelError, match="not in memory"):
        adaptive(model)
