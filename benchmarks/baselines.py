"""Ways of running fewer layers from the literature, to hold ANEE's policies against."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from anee_core.engine.whole_sequences import WholeSequences
from anee_core.interfaces import Action, Controller, DecisionContext, Observation
from anee_core.model import AdaptiveModel
from anee_core.policy import Policy, SignalProfiler


def hidden_states(model: AdaptiveModel, block: Tensor) -> list[Tensor]:
    """Return each layer's input, and the last one's output, for token ids [1, T]."""
    sequences = WholeSequences(model.adapter, model.parts, block)
    states = [sequences.embedded]
    for layer_idx in range(len(model.parts.layers)):
        states.append(sequences.layer(layer_idx, states[-1]))
    return states


def block_influence(model: AdaptiveModel, blocks: Tensor) -> list[float]:
    """Return 1 - cos(input, output) of each layer, on average over the tokens of ``blocks`` [N, T] (ShortGPT; Men et
    al., 2024, arXiv:2403.03853).
    """
    influence = torch.zeros(len(model.parts.layers))
    with torch.inference_mode():
        for block in blocks.split(1):
            states = hidden_states(model, block.to(model.device))
            for i, (before, after) in enumerate(pairwise(states)):
                cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
                influence[i] += float(1 - cosine.mean()) / len(blocks)
    return influence.tolist()


def without_least_influential(model: AdaptiveModel, influence: list[float], budget: float) -> str:
    """Return the policy that leaves out as few layers as the budget asks for, those of least influence."""
    costs = model.engine.costs
    order = sorted(range(len(influence)), key=lambda i: -influence[i])
    kept = next(k for k in range(len(order), -1, -1) if costs.least_share(sorted(order[:k])) <= budget + 1e-6)
    return f"static:skip={' '.join(map(str, sorted(order[kept:])))}"


class Lens(SignalProfiler):
    """Knows what the final norm and the head make of a hidden state in front of any layer."""

    names: ClassVar[tuple[str, ...]] = (*SignalProfiler.names, "lens_probability")

    def __init__(self, model: AdaptiveModel) -> None:
        self._adapter, self._parts = model.adapter, model.parts

    def _signal(self, seen: Observation, name: str) -> Tensor:
        return self.confidence(seen.hidden_states) if name == "lens_probability" else super()._signal(seen, name)

    def confidence(self, hidden_states: Tensor) -> Tensor:
        """Return the largest next-token probability [B, T] that hidden states [B, T, D] already give."""
        logits = self._adapter.logits(self._parts, self._parts.final_norm(hidden_states))
        return logits.float().softmax(-1).amax(-1)


@dataclass(frozen=True)
class ConfidenceExit(Controller):
    """Leave once the head is sure of the next token (CALM's softmax response; Schuster et al., 2022,
    arXiv:2207.07061). What asking the head in front of every layer costs is not charged.
    """

    name: ClassVar[str] = "confidence_exit"
    signals: ClassVar[tuple[str, ...]] = ("lens_probability",)

    threshold: float = 1.0
    first: int = 1

    def decide(self, signals: Tensor, context: DecisionContext) -> Tensor:
        """Return actions for one layer."""
        sure = (signals[..., 0] >= self.threshold) & (context.layer_idx >= self.first)
        return torch.where(sure, int(Action.EXIT), int(Action.PROCESS)).to(torch.uint8)[None]


def early_exits(model: AdaptiveModel, blocks: Tensor, budgets: list[float]) -> dict[float, Policy]:
    """Return, for each budget, early exit by confidence with the threshold that meets it on ``blocks`` [N, T]."""
    lens, first = Lens(model), 1
    with torch.inference_mode():
        confidence = torch.cat(
            [
                torch.stack([lens.confidence(h)[0] for h in hidden_states(model, block.to(model.device))[first:-1]])
                for block in blocks.split(1)
            ],
            dim=1,
        )
    run, skip = (shares.float() for shares in model.engine.costs.token_shares(torch.arange(blocks.shape[1])))
    # What leaving in front of each layer spends, and the last row: what staying spends.
    stayed = torch.cat((torch.zeros_like(run[:1]), run.cumsum(0)))
    left = torch.cat((skip.flip(0).cumsum(0).flip(0), torch.zeros_like(skip[:1])))
    spends = (stayed + left)[first:].repeat(1, len(blocks))
    found = {}
    for budget in budgets:
        low, high = 0.0, 1.0
        for _ in range(30):
            threshold = (low + high) / 2
            sure = torch.cat((confidence >= threshold, torch.ones_like(confidence[:1], dtype=torch.bool)))
            spent = float(spends.gather(0, sure.int().argmax(0)[None]).mean())
            low, high = (low, threshold) if spent > budget else (threshold, high)
        found[budget] = Policy(ConfidenceExit(high, first), profiler=lens)
    return found
