"""Adapters that change what they are given, leave autograd, show policies something else, or are wrong late only."""

from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, PLUGINS

from anee_adapters import LlamaAdapter
from anee_core.conformance.subject import Subject
from anee_core.conformance.suite import ADAPTER_CHECKS

CHECKS = {check.name: check for check in ADAPTER_CHECKS}


class ScalesInPlace(LlamaAdapter):
    def embed(self, parts, token_embeddings, position_ids):
        return token_embeddings.mul_(1.0 + 1e-3)


class PositionsInPlace(LlamaAdapter):
    def begin(self, parts, hidden_states, position_ids):
        return super().begin(parts, hidden_states, position_ids.add_(0).clamp_(max=5))


class OutsideOfAutograd(LlamaAdapter):
    @torch.no_grad()
    def run(self, *arguments):
        return super().run(*arguments)


class CutsTheGraph(LlamaAdapter):
    def logits(self, parts, hidden_states):
        return parts.head(hidden_states.detach())


class SeesNothing(LlamaAdapter):
    def attention_input(self, parts, layer_idx, hidden_states):
        return torch.zeros_like(hidden_states)


class SeesTheRawStates(LlamaAdapter):
    def attention_input(self, parts, layer_idx, hidden_states):
        return hidden_states


class RoundedPositions(LlamaAdapter):
    """Keys of skipped tokens are turned by angles of half precision, which is exact for the first positions only."""

    def project_kv(self, parts, layer_idx, hidden_states, call):
        turned = super().begin(parts, hidden_states, call.position_ids)[layer_idx]
        coarse = super().begin(parts, hidden_states, (call.position_ids // 16) * 16)[layer_idx]
        late = call.position_ids[..., None] >= 16
        pairs = zip(coarse.position_embeddings, turned.position_embeddings, strict=True)
        embeddings = tuple(torch.where(late, a, b) for a, b in pairs)
        return super().project_kv(parts, layer_idx, hidden_states, replace(call, position_embeddings=embeddings))


@pytest.mark.parametrize(
    ("name", "adapter", "message"),
    [
        ("inputs", ScalesInPlace(), "look at ModelAdapter.embed, which works in place"),
        ("inputs", PositionsInPlace(), "look at ModelAdapter.begin, which works in place"),
        ("gradients", OutsideOfAutograd(), "expected gradients of"),
        ("gradients", CutsTheGraph(), "expected gradients of"),
        ("attention input", SeesNothing(), "what attention of layer 0 is given"),
        ("attention input", SeesTheRawStates(), "what attention of layer 0 is given"),
        ("keys and values", RoundedPositions(), "keys of layer 0, skipped"),
    ],
)
def test_impure_adapter_fails_the_check(name, adapter, message):
    failure = CHECKS[name].failure(Subject(adapter, CONFIGS["llama"], plugins=PLUGINS))
    assert failure is not None
    assert message in failure
    assert "\n" not in failure
