"""Finds a gate's thresholds for every budget: what the model really spends under them, as it is deployed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from anee_core.controllers.gate import GateController, GateWeights
from anee_core.interfaces import Shortcut
from anee_core.model import AdaptiveModel
from anee_core.policy import Policy

BUDGETS = tuple(round(0.3 + 0.05 * i, 2) for i in range(14))
"""0.3 to 0.95; the first entries may be out of reach, and 1 is always there."""
_NEVER = -1e3
"""A threshold under which no score lies."""
_CLOSE = 0.002
_ROUNDS = 5


@dataclass
class Search:
    """What a model spends under thresholds that come from one number: a score in front of any layer.

    Args:
        model: the model, with the tokens' device and dtype.
        gate: weights; budgets and thresholds are ignored.
        shortcut: what skipped layers get.
        blocks: token ids [N, T] to measure on.
        options: of the gate controller.
        batch: sequences at once.
        advance: called after every measurement.
    """

    model: AdaptiveModel
    gate: GateWeights
    shortcut: Shortcut | None
    blocks: Tensor
    options: dict[str, object] = field(default_factory=dict)
    batch: int = 4
    advance: Callable[[], None] = lambda: None

    def thresholds(self, score: float) -> Tensor:
        """Return the thresholds [L] that let every token skip whose score lies below ``score``."""
        return (score - self.gate.mean) / self.gate.spread

    def spent(self, thresholds: Tensor) -> float:
        """Return the share of a dense token's FLOPs that the blocks' tokens take on average, deployed."""
        weights = replace(self.gate, budgets=torch.tensor([0.0, 1.0]), thresholds=thresholds.expand(2, -1))
        controller = GateController.of(weights, **self.options)
        probe = AdaptiveModel(self.model.model, self.model.adapter)
        probe.set_policy(Policy(controller, shortcut=self.shortcut), budget=1.0)
        run, skip = probe.engine.costs.token_shares(torch.arange(self.blocks.shape[1]))
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(self.blocks), self.batch):
                rows = self.blocks[start : start + self.batch]
                probe(rows.to(probe.device), use_cache=False, logits_to_keep=1)
                assert probe.last_trace is not None
                # Of tokens, not of what was executed: rows of a batch may repeat a token to be as long as others.
                spent = torch.where(probe.last_trace.ran, run[:, None], skip[:, None]).sum(0)
                total += float(spent.mean(1).sum())
        self.advance()
        return total / len(self.blocks)

    def run(self, budgets: tuple[float, ...] = BUDGETS) -> GateWeights:
        """Return the gate with thresholds for the budgets within reach, for the least possible one, and for 1."""
        low = float((self.gate.mean - 6 * self.gate.spread).min())
        high = float((self.gate.mean + 6 * self.gate.spread).max())
        # Pairs of a score and what it spends; spending falls as the score rises.
        known = [(low, 1.0), (high, self.spent(self.thresholds(high)))]
        least = known[-1][1]
        for budget in budgets:
            if budget <= least + _CLOSE:
                continue
            for _ in range(_ROUNDS):
                left, right = _around(known, budget)
                if min(abs(left[1] - budget), abs(right[1] - budget)) <= _CLOSE:
                    break
                score = _between(left, right, budget)
                known.append((score, self.spent(self.thresholds(score))))
                known.sort()
        reached = [budget for budget in budgets if budget > least + _CLOSE]
        scores = [min(known, key=lambda pair: abs(pair[1] - budget))[0] for budget in reached]
        rows = [self.thresholds(score) for score in (high, *scores)] + [torch.full_like(self.gate.mean, _NEVER)]
        return replace(self.gate, budgets=torch.tensor([least, *reached, 1.0]), thresholds=torch.stack(rows))


def _around(known: list[tuple[float, float]], budget: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the last pair of a score and its spending that spends at least a budget, and the pair after it."""
    ordered = sorted(known)
    left = max((pair for pair in ordered if pair[1] >= budget), key=lambda pair: pair[0])
    right = min((pair for pair in ordered if pair[0] > left[0]), key=lambda pair: pair[0])
    return left, right


def _between(left: tuple[float, float], right: tuple[float, float], budget: float) -> float:
    """Return the score at which spending crosses a budget, if it falls evenly; not too close to either end."""
    fall = left[1] - right[1]
    share = 0.5 if fall <= 0 else (left[1] - budget) / fall
    return left[0] + (right[0] - left[0]) * min(max(share, 0.05), 0.95)
