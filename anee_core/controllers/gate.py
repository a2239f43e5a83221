"""Skip a layer for tokens that it would hardly change, as a linear gate foresees from their hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from anee_core.accounting.budget import SLACK
from anee_core.accounting.costs import CostModel
from anee_core.checkpoint import CheckpointFormat
from anee_core.errors import BudgetError, CheckpointError
from anee_core.interfaces.configurable import Trained, TrainedWeights
from anee_core.interfaces.controller import Action, Controller, DecisionContext, protect_ends
from anee_core.interfaces.formulas import TIE, LinearGate
from anee_core.interfaces.setting import Setting
from anee_core.ranges import CountOrNone, Factor, Within

_FORMAT = CheckpointFormat(
    name="gate",
    what="gate",
    missing="'anee calibrate MODEL --folder FOLDER' makes such a folder",
    remedy="fit or copy it again",
    renew="fit it with this version",
    shapes={
        "weight": ("layers", "width"), "bias": ("layers",), "mean": ("layers",), "spread": ("layers",),
        "budgets": ("knots",), "shares": ("knots", "layers"),
    },
    facts=frozenset({"facts"}),
)  # fmt: skip


_REPAYING = 32
"""How many tokens pay back what the first ones spend beyond the budget."""
_STRIDE, _STEPS = 64, 2048
"""Tokens after those have the same prepared shares, 64 at a time; from position 131,000 on all have the same."""


@dataclass(frozen=True)
class GateWeights(TrainedWeights):
    """Weights of a gate, and the shares of tokens that skip each layer under each budget.

    A token's score in front of a layer is ``weight`` times its hidden state at unit norm, plus ``bias``; the higher it
    is, the more the token would lose by skipping.
    """

    format: ClassVar[CheckpointFormat] = _FORMAT

    weight: Tensor
    """[L, D] weight of the scores."""
    bias: Tensor
    """[L] bias of the scores."""
    mean: Tensor
    """[L] mean of the scores on the text of the fit."""
    spread: Tensor
    """[L] their standard deviation."""
    budgets: Tensor
    """[Q] budgets, ascending."""
    shares: Tensor
    """[Q, L] shares of the tokens that skip each layer, those with the lowest scores, under each of the budgets."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How all this was found."""

    def check(self, folder: str | Path) -> None:
        """Raise `CheckpointError` if spreads are 0, budgets too few or out of order, or shares out of range."""
        budgets, spread, shares = (part.float() for part in (self.budgets, self.spread, self.shares))
        ordered = len(budgets) > 1 and (budgets.diff() > 0).all() and budgets[0] > 0 and budgets[-1] <= 1 + SLACK
        if not ordered or spread.min() <= 0 or shares.min() < 0 or shares.max() > 1:
            raise CheckpointError(
                f"the gate in {folder} has spreads of 0, budgets out of order or shares out of range; fit it again"
            )

    def shares_at(self, budgets: Tensor) -> Tensor:
        """Return the shares [..., L] for budgets [...], between those of the budgets around each.

        Below the least budget that was prepared, they are those of the least.
        """
        known = self.budgets.float()
        right = torch.searchsorted(known, budgets).clamp(1, len(known) - 1)
        place = ((budgets - known[right - 1]) / (known[right] - known[right - 1])).clamp(0, 1)
        return torch.lerp(self.shares[right - 1].float(), self.shares[right].float(), place[..., None])


@dataclass(frozen=True)
class GateController(Trained[GateWeights], Controller):
    """Skip a layer for tokens that lose little by it.

    A score that is linear in the hidden state says how much. The budget says which share of the tokens skips each
    layer: those whose scores are low among the earlier ones of their sequence. So a budget is met on any text,
    whatever the scores are there.

    Options:
        folder: what ``anee calibrate`` or training wrote; may stand first, without its name. Default: what is
            installed for the model.
        prior: how many tokens the distribution of the fit counts for, beside those of the sequence.
        window: with how many earlier tokens a token is compared at most.
        first: how many first tokens of a sequence run every layer; none is compared with them.
        protect: how many first and last layers always run.
    """

    name: ClassVar[str] = "gate"
    checkpoint: ClassVar[CheckpointFormat | None] = _FORMAT
    weights_class: ClassVar[type[TrainedWeights]] = GateWeights
    command: ClassVar[str] = "anee calibrate"
    signals: ClassVar[tuple[str, ...]] = ("unit_state",)
    default_budget: ClassVar[float | None] = 0.75

    folder: str = ""
    prior: Factor = 8.0
    window: Annotated[int, Within(1, 65_536)] = 256
    first: Annotated[int, Within(0, 65_536)] = 4
    protect: tuple[CountOrNone, ...] = (1, 2)
    _weights: GateWeights | None = field(default=None, compare=False, repr=False)
    _shares: Tensor = field(default_factory=lambda: torch.empty(0), compare=False, repr=False)
    _positions: Tensor = field(default_factory=lambda: torch.empty(0), compare=False, repr=False)
    _ties: tuple[float, ...] = field(default=(), compare=False, repr=False)
    _linear: LinearGate | None = field(default=None, compare=False, repr=False)

    def protected(self, num_layers: int) -> frozenset[int]:
        """Return the protected first and last layers."""
        return protect_ends(self.protect, num_layers)

    def bind(self, setting: Setting) -> GateController:
        """Load the weights and find the shares of the budget.

        Raises:
            PolicyError: there are no weights for this model, or they are of another shape.
            BudgetError: the budget is below what the gate was fitted for.
        """
        weights = self.weights_for(setting)
        budget = setting.budget if setting.budget is not None else self.default_budget
        assert budget is not None
        there = {name: tensor.float().to(setting.device) for name, tensor in weights.tensors.items()}
        ready = replace(weights, **there)
        if budget < float(ready.budgets[0]) - SLACK:
            raise BudgetError(
                f"{self.name}: a budget of {budget:g} is below the least that it was fitted for, "
                f"{float(ready.budgets[0]):.3f}",
                float(ready.budgets[0]),
            )
        steps = _STRIDE * torch.arange(1, _STEPS)
        positions = torch.cat([torch.arange(self.settled + 1), self.settled + steps]).to(ready.budgets.device)
        shares = ready.shares_at(self.allowed(torch.tensor(budget), positions, setting.costs))
        shares[: self.first] = -1.0
        linear = LinearGate(ready.weight, ready.bias, ready.mean, ready.spread, self.prior, self.window)
        ties = tuple((TIE * ready.spread).tolist())
        return replace(self, _weights=ready, _shares=shares, _positions=positions, _ties=ties, _linear=linear)

    @property
    def settled(self) -> int:
        """First position whose token spends the budget, and neither more nor less."""
        return self.first + _REPAYING

    def allowed(self, budget: Tensor, positions: Tensor, costs: CostModel) -> Tensor:
        """Return the budgets whose shares tokens at ``positions`` have, in a sequence that meets ``budget``.

        Both shapes are broadcast. The first tokens run every layer. The next ones pay that back, in equal parts. Shares
        are solved for without attention; where that has its part, skipping saves more, and fewer skips are enough.
        """
        debt = self.first * (1 - budget) / _REPAYING
        spent = torch.where(positions < self.settled, budget - debt, budget)
        return 1 - (1 - spent) / costs.saved_more(positions)

    def _rows(self, position_ids: Tensor) -> Tensor:
        """Return the rows of the prepared shares for positions [...]: the last that are not for later ones."""
        return torch.bucketize(position_ids, self._positions.to(position_ids.device), right=True) - 1

    @property
    def linear(self) -> LinearGate | None:
        """The formula of its decisions, once bound; None for derived controllers, which may compute something else."""
        return self._linear if type(self) is GateController else None

    @property
    def compares(self) -> int:
        """With how many earlier tokens a token is compared at most."""
        return self.window

    def tie(self, layer_idx: int) -> float:
        """Return by how much two scores at a layer may differ and still be equal."""
        return self._ties[layer_idx]

    def shares(self, position_ids: Tensor) -> Tensor:
        """Return the shares [B, T, L] for tokens at positions [B, T]; -1 for the first ones."""
        return self._shares.to(position_ids.device)[self._rows(position_ids)]

    def score(self, signals: Tensor, context: DecisionContext) -> Tensor:
        """Return the scores [B, T]; NaN for the first tokens."""
        assert self._linear is not None
        score = self._linear.score(signals, context.layer_idx)
        return score.where(context.position_ids >= self.first, torch.nan)

    def decide(self, signals: Tensor, context: DecisionContext) -> Tensor:
        """Return actions for one layer."""
        assert self._linear is not None
        assert context.score is not None
        assert context.lower is not None
        assert context.compared is not None
        rank = self._linear.rank(context.score, context.lower, context.compared, context.layer_idx)
        shares = self._shares[:, context.layer_idx].to(signals.device)
        skip = rank < shares[self._rows(context.position_ids)]
        return torch.where(skip, int(Action.SKIP), int(Action.PROCESS)).to(torch.uint8)[None]
