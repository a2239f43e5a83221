"""Skip a layer for tokens that it would hardly change, as a linear gate foresees from their hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from anee_core.checkpoint import CheckpointFormat
from anee_core.errors import BudgetError, CheckpointError, PolicyError
from anee_core.interfaces import Action, Controller, DecisionContext, LinearGate, Setting, protect_ends
from anee_core.trained import weights_for

_FORMAT = CheckpointFormat(
    name="gate",
    what="gate",
    missing="'anee calibrate MODEL --folder FOLDER' makes such a folder",
    remedy="fit or copy it again",
    renew="fit it with this version",
    shapes={
        "weight": ("layers", "width"), "bias": ("layers",), "mean": ("layers",), "spread": ("layers",),
        "budgets": ("knots",), "thresholds": ("knots", "layers"),
    },
    facts=frozenset({"facts"}),
)  # fmt: skip


_REPAYING = 32
"""How many tokens pay back what the first ones spend beyond the budget."""


@dataclass(frozen=True)
class GateWeights:
    """What is fitted or trained.

    A token's score in front of a layer is ``weight`` [L, D] times its hidden state at unit norm, plus ``bias`` [L]; the
    higher, the more it would lose by skipping. ``mean`` [L] and ``spread`` [L] are the scores' mean and standard
    deviation on the text of the fit. ``thresholds`` [Q, L], in units of ``spread`` from the mean, are what each of the
    ``budgets`` [Q] (ascending) takes. ``facts`` says how all this was found.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    spread: Tensor
    budgets: Tensor
    thresholds: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Number of layers and width."""
        return self.weight.shape[0], self.weight.shape[1]

    def save(self, folder: str | Path) -> None:
        """Write gate.json and gate.safetensors into a folder.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        _FORMAT.write(folder, {"facts": dict(self.facts)}, {name: getattr(self, name) for name in _FORMAT.shapes})

    @classmethod
    def load(cls, folder: str | Path) -> GateWeights:
        """Read what `save` wrote.

        Raises:
            CheckpointError: see `CheckpointFormat.read`.
        """
        header, tensors = _FORMAT.read(folder)
        if not (tensors["spread"] > 0).all() or not (tensors["budgets"].diff() > 0).all():
            raise CheckpointError(f"the gate in {folder} has spreads of 0 or budgets out of order; fit it again")
        return cls(**{**header, **tensors})

    def at(self, budgets: Tensor) -> Tensor:
        """Return the thresholds [..., L] of budgets [...], between those of the budgets around each; below the least
        that was prepared, those of the least.
        """
        known = self.budgets.float()
        right = torch.searchsorted(known, budgets).clamp(1, len(known) - 1)
        place = ((budgets - known[right - 1]) / (known[right] - known[right - 1])).clamp(0, 1)
        return torch.lerp(self.thresholds[right - 1].float(), self.thresholds[right].float(), place[..., None])


@dataclass(frozen=True)
class GateController(Controller):
    """Skip a layer for tokens that lose little by it.

    A score that is linear in the hidden state says how much. It is compared with a threshold that depends on the
    budget, relative to the scores of the sequence's earlier tokens at this layer, so that text of another kind than
    the gate has seen spends no more and no less.

    Options:
        folder: what ``anee calibrate`` or training wrote; may stand first, without its name. Default: what is
            installed for the model.
        prior: how many tokens the statistics of the fit count for, beside those of the sequence.
        first: how many first tokens of a sequence run every layer.
        protect: how many first and last layers always run.
    """

    name: ClassVar[str] = "gate"
    positional: ClassVar[str | None] = "folder"
    checkpoint: ClassVar[CheckpointFormat | None] = _FORMAT
    signals: ClassVar[tuple[str, ...]] = ("unit_state",)
    tallies: ClassVar[int] = 3
    default_budget: ClassVar[float | None] = 0.75

    folder: str = ""
    prior: float = 64.0
    first: int = 4
    protect: tuple[int, ...] = (1, 2)
    _weights: GateWeights | None = field(default=None, init=False, compare=False, repr=False)
    _thresholds: Tensor = field(default_factory=lambda: torch.empty(0), init=False, compare=False, repr=False)
    _linear: LinearGate | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.prior <= 0 or self.first < 0:
            raise PolicyError(f"gate: prior is above 0 and first at least 0; got {self.prior:g} and {self.first}")

    @classmethod
    def of(cls, weights: GateWeights, **options: Any) -> GateController:
        """Return a gate with weights in memory, not yet bound."""
        gate = cls(**options)
        object.__setattr__(gate, "_weights", weights)
        return gate

    def protected(self, num_layers: int) -> frozenset[int]:
        """Return the protected first and last layers."""
        return protect_ends(self.protect, num_layers)

    def bind(self, setting: Setting) -> GateController:
        """Load the weights and find the thresholds of the budget.

        Raises:
            PolicyError: there are no weights for this model, or they are of another shape.
            BudgetError: the budget is below what the gate was fitted for.
        """
        weights = weights_for(self, GateWeights.load, setting, "anee calibrate", self._weights)
        budget = setting.budget if setting.budget is not None else self.default_budget
        assert budget is not None
        bound = replace(self)
        ready = replace(weights, **{n: getattr(weights, n).float().to(setting.device) for n in _FORMAT.shapes})
        if budget < float(ready.budgets[0]) - 1e-6:
            raise BudgetError(
                f"{self.name}: a budget of {budget:g} is below the least that it was fitted for, "
                f"{float(ready.budgets[0]):.3f}"
            )
        positions = torch.arange(self.settled + 1, device=ready.budgets.device)
        thresholds = ready.at(self.allowed(torch.tensor(budget), positions))
        thresholds[: self.first] = -torch.inf
        object.__setattr__(bound, "_weights", ready)
        object.__setattr__(bound, "_thresholds", thresholds)
        linear = LinearGate(ready.weight, ready.bias - ready.mean, ready.spread, self.prior)
        object.__setattr__(bound, "_linear", linear)
        return bound

    @property
    def settled(self) -> int:
        """First position whose token spends the budget, and neither more nor less."""
        return self.first + _REPAYING

    def allowed(self, budget: Tensor, positions: Tensor) -> Tensor:
        """Return what tokens at ``positions`` may spend, for a sequence that meets a budget; both shapes are broadcast.

        The first tokens run every layer. The next ones pay that back, in equal parts.
        """
        debt = self.first * (1 - budget) / _REPAYING
        return torch.where(positions < self.settled, budget - debt, budget)

    @property
    def linear(self) -> LinearGate | None:
        """What it computes, once bound."""
        return self._linear

    def thresholds(self, position_ids: Tensor) -> Tensor:
        """Return the thresholds [B, T, L] of tokens at positions [B, T]."""
        return self._thresholds.to(position_ids.device)[position_ids.clamp(max=self.settled)]

    def tally(self, signals: Tensor, context: DecisionContext) -> Tensor:
        """Return each token's deviation from the mean of the fit, its square, and 1, [B, T, 3]."""
        deviation = self._deviation(signals, context.layer_idx)
        return torch.stack((deviation, deviation.square(), torch.ones_like(deviation)), dim=-1)

    def decide(self, signals: Tensor, context: DecisionContext) -> Tensor:
        """Return actions for one layer."""
        layer_idx = context.layer_idx
        assert self._linear is not None
        assert context.totals is not None
        spread = self._linear.spread[layer_idx]
        score = standardised(self._deviation(signals, layer_idx), context.totals, self.prior, spread)
        thresholds = self._thresholds[:, layer_idx].to(signals.device)
        skip = score < thresholds[context.position_ids.clamp(max=self.settled)]
        return torch.where(skip, int(Action.SKIP), int(Action.PROCESS)).to(torch.uint8)[None]

    def _deviation(self, signals: Tensor, layer_idx: int) -> Tensor:
        linear = self._linear
        assert linear is not None
        return signals @ linear.weight[layer_idx].to(signals.device) + linear.offset[layer_idx].to(signals.device)


def standardised(deviation: Tensor, totals: Tensor, prior: float, spread: Tensor) -> Tensor:
    """Return how far scores lie from the mean of their sequence so far, in its standard deviations, [B, T].

    Args:
        deviation: [B, T] of the scores from the mean of the fit.
        totals: [B, T, 3] what `GateController.tally` summed up before each token.
        prior: how many tokens the statistics of the fit count for.
        spread: standard deviation of the fit, [].
    """
    total, squares, count = totals.unbind(-1)
    weight = count + prior
    mean = total / weight
    variance = (squares + prior * spread.double().square()) / weight - mean.square()
    return (deviation.double() - mean) * variance.clamp(min=1e-12).rsqrt()
