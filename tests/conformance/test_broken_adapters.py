"""The conformance suite catches wrong adapters: for every check something broken fails it."""

from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, PLUGINS
from torch.nn import functional
from transformers.models.llama import modeling_llama

from anee_adapters import Gemma2Adapter, Gemma3Adapter, GPT2Adapter, GPTJAdapter, LlamaAdapter, MixtralAdapter
from anee_core.conformance.subject import Subject
from anee_core.conformance.suite import ADAPTER_CHECKS
from anee_core.interfaces import Work, rotate

CHECKS = {check.name: check for check in ADAPTER_CHECKS}


def layout(base, **changes):
    """Return an adapter like ``base`` whose table of names is wrong."""
    return type("Broken", (type(base),), {"layout": replace(base.layout, **changes)})()


class PositionOffByOne(LlamaAdapter):
    def begin(self, parts, hidden_states, position_ids):
        return super().begin(parts, hidden_states, position_ids + 1)


class PositionsFromZero(LlamaAdapter):
    """Right for a first block only."""

    def begin(self, parts, hidden_states, position_ids):
        return super().begin(parts, hidden_states, position_ids - position_ids[:, :1])


class PositionsOfFirstRow(LlamaAdapter):
    def begin(self, parts, hidden_states, position_ids):
        return super().begin(parts, hidden_states, position_ids[:1].expand_as(position_ids))


class NoLearnedPositions(GPT2Adapter):
    def embed(self, parts, token_embeddings, position_ids):
        return token_embeddings


class OneRotaryForAllLayers(Gemma3Adapter):
    def begin(self, parts, hidden_states, position_ids):
        return (super().begin(parts, hidden_states, position_ids)[0],) * len(parts.layers)


class NoWindow(LlamaAdapter):
    def window(self, config, layer_idx):
        return None


class WindowTooWide(LlamaAdapter):
    def window(self, config, layer_idx):
        return config.sliding_window + 1


class NoSoftCap(Gemma2Adapter):
    def logits(self, parts, hidden_states):
        return parts.head(hidden_states)


class NoNormBeforeKeys(LlamaAdapter):
    layout = replace(LlamaAdapter.layout, input_norm=None)


class QueriesFirstInReverse(GPT2Adapter):
    """Takes [Q|K|V] for [Q|V|K]."""

    def project_kv(self, parts, layer_idx, hidden_states, call):
        return super().project_kv(parts, layer_idx, hidden_states, call)[::-1]


class NotRotated(GPTJAdapter):
    def project_kv(self, parts, layer_idx, hidden_states, call):
        return LlamaAdapter.project_kv(self, parts, layer_idx, hidden_states, call)


class NextLayersKeys(LlamaAdapter):
    def project_kv(self, parts, layer_idx, hidden_states, call):
        return super().project_kv(parts, (layer_idx + 1) % len(parts.layers), hidden_states, call)


class CallOfTheFirstLayer(LlamaAdapter):
    """Counts on layer 0 having just run."""

    def run(self, parts, layer_idx, hidden_states, call, layer_cache):
        if layer_idx == 0:
            self.call = call
        call = replace(call, position_embeddings=self.call.position_embeddings)
        return super().run(parts, layer_idx, hidden_states, call, layer_cache)


class LastTokenOnly(LlamaAdapter):
    def project_kv(self, parts, layer_idx, hidden_states, call):
        return tuple(part[:, :, -1:] for part in super().project_kv(parts, layer_idx, hidden_states, call))


class DependsOnBlockLength(LlamaAdapter):
    def begin(self, parts, hidden_states, position_ids):
        return super().begin(parts, hidden_states, position_ids * hidden_states.shape[1])


class MixesRows(LlamaAdapter):
    def embed(self, parts, token_embeddings, position_ids):
        return token_embeddings + 0.1 * token_embeddings.mean(0, keepdim=True)


class Forgetful(LlamaAdapter):
    """Gives the layer a cache that remembers nothing; what comes before is written but never read."""

    def run(self, parts, layer_idx, hidden_states, call, layer_cache):
        class Forgetting:
            def update(self, keys, values, layer_idx):
                layer_cache.update(keys, values, layer_idx)
                return keys, values

        mask = call.attention_mask
        call = call.with_mask(None if mask is None else mask[..., -hidden_states.shape[1] :])
        return super().run(parts, layer_idx, hidden_states, call, Forgetting())


class FreeKeys(LlamaAdapter):
    def kv_work(self, parts, layer_idx):
        return Work()


class CheapLayers(LlamaAdapter):
    def layer_work(self, parts, layer_idx):
        work = super().layer_work(parts, layer_idx)
        return replace(work, flops=work.flops // (layer_idx + 1))


class AllExperts(MixtralAdapter):
    """Charges every expert, though a token runs two."""

    def layer_work(self, parts, layer_idx):
        work = super().layer_work(parts, layer_idx)
        return replace(work, flops=2 * sum(p.numel() for p in parts.layers[layer_idx].parameters() if p.dim() > 1))


class WrongHeadWidth(LlamaAdapter):
    def attention_width(self, config):
        return config.num_key_value_heads * self.head_dim(config)


class Carries(LlamaAdapter):
    """Adds something of the previous call to the next one: state that no cache knows of."""

    def embed(self, parts, token_embeddings, position_ids):
        last, self.last = getattr(self, "last", None), token_embeddings[:, -1:]
        return token_embeddings if last is None or len(last) != len(self.last) else token_embeddings + 0.1 * last


class KeepsFirstModel(LlamaAdapter):
    def parts(self, model):
        self.first = getattr(self, "first", None) or super().parts(model)
        return replace(super().parts(model), final_norm=self.first.final_norm)


class Patches(LlamaAdapter):
    def parts(self, model):
        for layer in model.model.layers:
            layer.forward = layer.forward
        return super().parts(model)


class ChangesConfig(LlamaAdapter):
    def parts(self, model):
        model.config.use_cache = False
        return super().parts(model)


class PatchesTransformers(LlamaAdapter):
    """Takes rotary positions away from every model in the process."""

    def parts(self, model):
        modeling_llama.apply_rotary_pos_emb = lambda queries, keys, *_: (queries, keys)
        return super().parts(model)


class ChangesBuffers(LlamaAdapter):
    def parts(self, model):
        model.model.rotary_emb.original_inv_freq.zero_()
        return super().parts(model)


class RemembersAngles(LlamaAdapter):
    """Computes rotary angles once, whatever the model."""

    def begin(self, parts, hidden_states, position_ids):
        key = position_ids.tolist().__repr__()
        self.angles = getattr(self, "angles", {})
        if key not in self.angles:
            self.angles[key] = super().begin(parts, hidden_states, position_ids)
        return self.angles[key]


class OnlyInSinglePrecision(LlamaAdapter):
    def project_kv(self, parts, layer_idx, hidden_states, call):
        keys, values = super().project_kv(parts, layer_idx, hidden_states, call)
        return (keys, values) if keys.dtype == torch.float32 else (keys * 0, values * 0)


class MultipliesWeights(LlamaAdapter):
    """Reads the weights past their modules, whatever wraps those."""

    def project_kv(self, parts, layer_idx, hidden_states, call):
        attention = parts.layers[layer_idx].self_attn
        normed = parts.layers[layer_idx].input_layernorm(hidden_states)
        keys, values = (
            functional.linear(normed, part.weight).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for part in (attention.k_proj, attention.v_proj)
        )
        return rotate(keys, *call.position_embeddings), values


class EndsEarly(LlamaAdapter):
    """Places no token beyond position 40."""

    def begin(self, parts, hidden_states, position_ids):
        return super().begin(parts, hidden_states, position_ids.clamp(max=40))


class FullPrecisionLogits(LlamaAdapter):
    def logits(self, parts, hidden_states):
        return super().logits(parts, hidden_states).float()


class WeightlessLayers(MixtralAdapter):
    def layer_work(self, parts, layer_idx):
        return replace(super().layer_work(parts, layer_idx), token_bytes=0, table_bytes=0)


class NoEnd(GPT2Adapter):
    def position_limit(self, parts):
        return None


class EndsTooSoon(LlamaAdapter):
    def position_limit(self, parts):
        return 64


class KnowsOneReason(LlamaAdapter):
    """Forgets what every family refuses."""

    def refuse(self, config):
        return "no" if "linear_attention" in (getattr(config, "layer_types", None) or ()) else None


class NothingAdded(GPTJAdapter):
    def run(self, parts, layer_idx, hidden_states, call, layer_cache):
        return super().run(parts, layer_idx, hidden_states, call, layer_cache) - hidden_states


class HeadWidthFromWidth(type(PLUGINS.adapters["qwen3"])):
    def head_dim(self, config):
        return config.hidden_size // config.num_attention_heads


class OtherActivation(GPT2Adapter):
    def recipe(self, config):
        return replace(super().recipe(config), activation="model_type")


class BesideAttention(LlamaAdapter):
    def recipe(self, config):
        return replace(super().recipe(config), parallel=True)


class TurnsTheOtherWay(LlamaAdapter):
    def angles(self, parts, call):
        cos, sin = super().angles(parts, call)
        return cos, -sin


class AcceptsAnything(LlamaAdapter):
    def refuse(self, config):
        return None


class RefusesEverything(LlamaAdapter):
    def refuse(self, config):
        return "no"


BROKEN = [
    ("paths", "llama", layout(LlamaAdapter(), mlp="mpl")),
    ("paths", "llama", layout(LlamaAdapter(), cache_argument="layer_past")),
    ("paths", "qwen3-moe", layout(PLUGINS.adapters["qwen3_moe"], experts="mlp.expert")),
    ("layer arguments", "llama", PositionOffByOne()),
    ("layer arguments", "gpt2", NoLearnedPositions()),
    ("layer arguments", "gemma3", OneRotaryForAllLayers()),
    ("layer arguments", "llama", layout(LlamaAdapter(), rotary=None)),
    ("window", "mistral", NoWindow()),
    ("window", "mistral", WindowTooWide()),
    ("layer output", "gptj", NothingAdded()),
    ("layer output", "llama", layout(LlamaAdapter(), final_norm=None)),
    ("dense sequence", "gemma2", NoSoftCap()),
    ("dense sequence", "llama", EndsEarly()),
    ("dense sequence", "llama", FullPrecisionLogits()),
    ("dense decode", "llama", PositionsFromZero()),
    ("padding", "llama", PositionsOfFirstRow()),
    ("keys and values", "llama", NoNormBeforeKeys()),
    ("keys and values", "gpt2", QueriesFirstInReverse()),
    ("keys and values", "gptj", NotRotated()),
    ("keys and values", "llama", NextLayersKeys()),
    ("keys and values", "qwen3", layout(PLUGINS.adapters["qwen3"], key_norm=None)),
    ("keys and values", "llama", OnlyInSinglePrecision()),
    ("keys and values", "llama", MultipliesWeights()),
    ("paths", "qwen3", HeadWidthFromWidth()),
    ("skip", "llama", CallOfTheFirstLayer()),
    ("exit", "llama", LastTokenOnly()),
    ("parallel equals stepwise", "llama", DependsOnBlockLength()),
    ("rows", "llama", MixesRows()),
    ("causal effect", "llama", Forgetful()),
    ("fast step", "gpt2", OtherActivation()),
    ("fast step", "llama", BesideAttention()),
    ("fast cache", "llama", TurnsTheOtherWay()),
    ("cost model", "llama", FreeKeys()),
    ("cost model", "llama", WrongHeadWidth()),
    ("cost model", "mixtral", AllExperts()),
    ("cost model", "mixtral", WeightlessLayers()),
    ("budget", "llama", FreeKeys()),
    ("budget", "llama", CheapLayers()),
    ("rollback", "llama", Carries()),
    ("reorder", "llama", Carries()),
    ("generate", "llama", PositionsFromZero()),
    ("save and load", "llama", KeepsFirstModel()),
    ("hygiene", "llama", Patches()),
    ("hygiene", "llama", ChangesConfig()),
    ("hygiene", "llama", PatchesTransformers()),
    ("hygiene", "llama", ChangesBuffers()),
    ("hygiene", "llama", RemembersAngles()),
    ("hygiene", "llama", KeepsFirstModel()),
    ("refusal", "llama", AcceptsAnything()),
    ("refusal", "llama", RefusesEverything()),
    ("refusal", "llama", KnowsOneReason()),
    ("refusal", "gpt2", NoEnd()),
    ("refusal", "llama", EndsTooSoon()),
]


def test_something_broken_is_tried_with_every_check():
    elsewhere = {"attention input", "inputs", "gradients"}  # test_impure_adapters.py
    assert {name for name, _, _ in BROKEN} | elsewhere == set(CHECKS)


@pytest.mark.parametrize(
    ("name", "config", "adapter"),
    BROKEN,
    ids=[f"{name}: {config}, {type(adapter).__name__} {i}" for i, (name, config, adapter) in enumerate(BROKEN)],
)
def test_broken_adapter_fails_the_check(name, config, adapter, monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)  # put back after
    failure = CHECKS[name].failure(Subject(adapter, CONFIGS[config], plugins=PLUGINS))
    assert failure is not None
    assert failure.startswith("expected ")
    assert "; found " in failure
    assert "; look at " in failure
    assert "\n" not in failure


def test_failure_names_what_is_wrong():
    subject = Subject(layout(LlamaAdapter(), key="self_attn.key_proj"), CONFIGS["llama"], plugins=PLUGINS)
    failure = CHECKS["paths"].failure(subject)
    assert "no 'key_proj' (of path 'self_attn.key_proj') in LlamaAttention; it has: q_proj, k_proj" in failure
    assert failure.endswith("look at the paths of Layout")
    failure = CHECKS["window"].failure(Subject(WindowTooWide(), CONFIGS["mistral"], plugins=PLUGINS))
    assert "layer 0 to see 5 positions" in failure
    assert "found 6 (ModelAdapter.window says 6)" in failure
