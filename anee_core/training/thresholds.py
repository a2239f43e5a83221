"""Finds a gate's thresholds for every budget: what the model really spends under them, as it is deployed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

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
    """Looks for thresholds that spend what they should.

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

    def spent(self, thresholds: Tensor) -> float:
        """Return the share of a dense token's FLOPs that the blocks' tokens take on average, deployed.

        A sequence's first tokens, and those that pay for them, are left out.
        """
        weights = replace(self.gate, budgets=torch.tensor([0.0, 1.0]), thresholds=thresholds.expand(2, -1))
        controller = GateController.of(weights, **self.options)
        probe = AdaptiveModel(self.model.model, self.model.adapter)
        probe.set_policy(Policy(controller, shortcut=self.shortcut), budget=1.0)
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(self.blocks), self.batch):
                rows = self.blocks[start : start + self.batch]
                probe(rows.to(probe.device), use_cache=False, logits_to_keep=1)
                assert probe.last_trace is not None
                # Of tokens, not of what was executed: rows of a batch may repeat a token to be as long as others.
                spent = probe.engine.costs.spent_shares(probe.last_trace.ran)
                total += float(spent[:, min(controller.settled, spent.shape[1] // 2) :].mean(1).sum())
        self.advance()
        return total / len(self.blocks)

    def from_one_score(self, budgets: tuple[float, ...] = BUDGETS) -> GateWeights:
        """Return the gate with thresholds under which every token skips whose score lies below a number, the same for
        all layers: for the budgets within reach, for the least possible one, and for 1.
        """

        def thresholds(score: float) -> Tensor:
            return (score - self.gate.mean) / self.gate.spread

        low = float((self.gate.mean - 6 * self.gate.spread).min())
        high = float((self.gate.mean + 6 * self.gate.spread).max())
        least = self.spent(thresholds(high))
        known = [(low, 1.0), (high, least)]
        reached = [budget for budget in budgets if budget > least + _CLOSE]
        rows = [thresholds(high), *(thresholds(self._solve(budget, thresholds, known)) for budget in reached)]
        return self._with(torch.tensor([least, *reached]), rows)

    def from_trained(self, budgets: tuple[float, ...] = BUDGETS) -> GateWeights:
        """Return the gate with the thresholds that it has, those of each budget moved as one until it is met."""
        least = float(self.gate.budgets[0])
        kept = [least, *(budget for budget in budgets if budget > least + _CLOSE)]
        rows = []
        for budget in kept:
            base = self.gate.at(torch.tensor(budget))
            known = [(-4.0, 1.0), (0.0, self.spent(base)), (4.0, 0.0)]
            rows.append(base + self._solve(budget, partial(torch.add, base), known))
        return self._with(torch.tensor(kept), rows)

    def _solve(self, budget: float, thresholds: Callable[[float], Tensor], known: list[tuple[float, float]]) -> float:
        """Return the number whose thresholds spend a budget; spending falls as it rises. ``known`` pairs grow."""
        for _ in range(_ROUNDS):
            closest = min(known, key=lambda pair: abs(pair[1] - budget))
            if abs(closest[1] - budget) <= _CLOSE:
                break
            score = _between(*_around(known, budget), budget)
            known.append((score, self.spent(thresholds(score))))
        return min(known, key=lambda pair: abs(pair[1] - budget))[0]

    def _with(self, budgets: Tensor, rows: list[Tensor]) -> GateWeights:
        everything = torch.full_like(self.gate.mean, _NEVER)
        return replace(
            self.gate, budgets=torch.cat((budgets, torch.ones(1))), thresholds=torch.stack([*rows, everything])
        )


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
