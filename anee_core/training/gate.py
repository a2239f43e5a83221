"""Training a gate and shortcuts together, for all budgets at once: hard decisions, straight-through gradients.

The model itself stays as it is, and is the teacher: what is learned is to change its next-token distributions as little
as possible for what is spent. Skipped tokens keep their keys and values, as they will when deployed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anee_core.accounting.costs import CostModel
from anee_core.adapter.layout import Parts
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.cache.token_logs import compared
from anee_core.controllers.gate import GateController, GateWeights
from anee_core.engine.whole_sequences import WholeSequences
from anee_core.evaluation.divergence import divergence, divergences
from anee_core.interfaces.formulas import TIE, ranks
from anee_core.policy.shortcuts import ShortcutWeights
from anee_core.training.objective import Objective
from anee_core.training.options import MOST, GateOptions
from anee_core.training.walk import Walk

_EDGE = 1e-4
"""Ranks and shares are kept this far from 0 and 1, where a normal distribution has its infinities."""


class GatedModel(Objective):
    """Loss of a model whose layers are skipped by a gate.

    It is the logarithm of the divergence from the dense model, plus the price of what is spent.

    It takes many parameters because it is put together of parts that are made elsewhere.

    Args:
        adapter: knows the model's family.
        parts: the model's modules.
        costs: what its layers cost, shortcuts included.
        gate: weights to start from.
        shortcuts: weights to start from.
        controller: says which tokens and layers always run, and how much the fit's statistics count.
        options: how the gate is trained.
        held_out: blocks [N, T] to validate on, as deployed.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        parts: Parts,
        costs: CostModel,
        gate: GateWeights,
        shortcuts: ShortcutWeights,
        controller: GateController,
        options: GateOptions,
        held_out: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.adapter, self.parts, self.costs = parts.model, adapter, parts, costs
        self.options, self.held_out = options, held_out
        layers = len(parts.layers)
        self._controller, self.first = controller, controller.first
        self.free = [i not in controller.protected(layers) for i in range(layers)]
        self.down, self.up = nn.Parameter(shortcuts.down.float()), nn.Parameter(shortcuts.up.float())
        self.shortcut_bias = nn.Parameter(shortcuts.bias.float())
        # In units of the fit's spread, so that one learning rate suits all layers.
        unit = gate.spread.float()
        self.weight = nn.Parameter(gate.weight.float() / unit[:, None])
        self.bias = nn.Parameter(gate.bias.float() / unit)
        self.budgets: Tensor
        self.register_buffer("budgets", torch.linspace(options.least, MOST, options.knots))
        self.thresholds = nn.Parameter(_normal(gate.shares_at(self.budgets)))
        self.mean: Tensor
        self.spread: Tensor
        self.price: Tensor
        self.register_buffer("mean", gate.mean.float() / unit)
        self.register_buffer("spread", torch.ones_like(unit))
        self.register_buffer("price", torch.full((options.knots,), 4.0))

    def train(self, mode: bool = True) -> GatedModel:
        """Switch to training; the model itself stays without dropout."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of token ids [B, T]."""
        budgets = self.draw_budgets(input_ids)
        with torch.no_grad():
            wanted = self.dense(input_ids)
        logits, spent = self.run(input_ids, budgets, self.options.noise)
        quality = divergences(wanted, logits).mean(1)
        over = spent.mean(1) - budgets
        # By its logarithm, so that budgets that leave little to lose count as much as those that leave a lot.
        loss = (quality.clamp(min=1e-6).log() + (self.near(budgets) @ self.price) * over).mean()
        self.move_price(self.price, budgets, over.detach())
        figures = {"quality": quality.mean(), "spent": spent.mean(), "over": over.mean(), "price": self.price.mean()}
        return loss, {name: value.detach() for name, value in figures.items()}

    def draw_budgets(self, input_ids: Tensor) -> Tensor:
        """Return a budget for each row, [B], evenly drawn."""
        lowest = self.options.least
        return lowest + (MOST - lowest) * torch.rand(input_ids.shape[0], device=input_ids.device)

    def move_price(self, price: Tensor, budgets: Tensor, over: Tensor) -> None:
        """Raise the prices [Q] of knots near budgets that are exceeded, and lower those near budgets not used up.

        ``budgets`` [B] are exceeded where ``over`` [B] is above 0. This is dual ascent, in place.
        """
        shares = self.near(budgets)
        rise = (shares * over[:, None]).sum(0) / shares.sum(0).clamp(min=1e-6)
        price.mul_((self.options.pressure * rise.clamp(-0.2, 0.2)).exp()).clamp_(1e-3, 1e3)

    def dense(self, input_ids: Tensor) -> Tensor:
        """Return the model's own logits [B, T, V]."""
        sequences = WholeSequences(self.adapter, self.parts, input_ids)
        hidden_states = sequences.embedded
        for layer_idx in range(len(self.parts.layers)):
            hidden_states = sequences.layer(layer_idx, hidden_states)
        return sequences.logits(hidden_states)

    def walk(self, input_ids: Tensor, frozen: bool = False) -> Walk:
        """Return token ids [B, T] on their way through the layers; ``frozen`` hidden states carry no gradients."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            sequences = WholeSequences(self.adapter, self.parts, input_ids)
        return Walk(sequences, self.costs, self.free, frozen)

    def run(self, input_ids: Tensor, budgets: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return logits [B, T, V] under ``budgets`` [B], and each token's share of a dense one's FLOPs, [B, T]."""
        walk = self.walk(input_ids)
        thresholds = self.thresholds_of(budgets, walk.positions)
        for visit in walk.visits():
            score = self.score(visit.unit.float(), visit.layer_idx)
            keep = self._keep(score - thresholds[..., visit.layer_idx], noise)
            keep = torch.where(walk.positions < self.first, 1.0, keep)
            walk.go_on(visit, keep, self.estimate(visit.layer_idx, visit.unit))
        return walk.logits(), walk.spent

    def estimate(self, layer_idx: int, unit: Tensor) -> Tensor:
        """Return the shortcut's estimate of what a layer adds to hidden states of this ``unit`` norm [B, T, D]."""
        down, up = self.down[layer_idx].to(unit.dtype), self.up[layer_idx].to(unit.dtype)
        return unit @ down.T @ up.T + self.shortcut_bias[layer_idx].to(unit.dtype)

    def score(self, unit: Tensor, layer_idx: int) -> Tensor:
        """Return how scores [B, T] rank among those of earlier tokens, as quantiles of a normal distribution.

        That is what `GateController.decide` compares. Gradients are those of the distance to the mean of the earlier
        tokens, in their standard deviations.
        """
        # What is decided must not depend on the precision that layers are trained in.
        with torch.autocast(unit.device.type, enabled=False):
            deviation = unit @ self.weight[layer_idx] + self.bias[layer_idx] - self.mean[layer_idx]
        first, prior = self.first, self._controller.prior
        with torch.no_grad():
            if self.training:
                seen = deviation[:, first:]
                self.mean[layer_idx] += 0.02 * seen.mean()
                self.spread[layer_idx].lerp_(seen.std(), 0.02)
            spread = self.spread[layer_idx]
            kept = deviation.clone()
            kept[:, :first] = torch.nan
            lower, among = compared(kept, deviation, self._controller.compares, TIE * spread)
            rank = ranks(deviation / spread, lower, among, prior)
        counted, window = deviation[:, first:].double(), self._controller.compares
        sums = [nn.functional.pad(_sum_before(part, window), (first, 0)) for part in (counted, counted.square())]
        weight = among + prior
        mean = sums[0] / weight
        variance = (sums[1] + prior * spread.double().square()) / weight - mean.square()
        distance = ((deviation.double() - mean) * variance.clamp(min=1e-12).rsqrt()).float()
        return distance + (_normal(rank) - distance).detach()

    def _keep(self, margin: Tensor, noise: float) -> Tensor:
        """Return 1 where a margin [B, T] is not negative and 0 elsewhere, with the gradient of a sigmoid."""
        if noise:
            uniform = torch.rand(2, *margin.shape, device=margin.device).clamp(1e-6, 1 - 1e-6)
            gumbel = -(-uniform.log()).log()
            margin = margin + noise * (gumbel[0] - gumbel[1])
        soft = torch.sigmoid(margin / self.options.temperature)
        return soft + ((margin >= 0).float() - soft).detach()

    def thresholds_of(self, budgets: Tensor, positions: Tensor) -> Tensor:
        """Return the thresholds [B, T, L] of tokens in sequences with ``budgets`` [B], as normal quantiles.

        The tokens are at ``positions`` [T].
        """
        allowed = self._controller.allowed(budgets[:, None], positions, self.costs)
        with torch.autocast(allowed.device.type, enabled=False):
            return _normal(self.near(allowed) @ torch.special.ndtr(self.thresholds))

    def near(self, budgets: Tensor) -> Tensor:
        """Return the weight of each knot for budgets [...], [..., Q].

        Weights are linear between two neighbours; beyond an end, that end has all of it.
        """
        budgets = budgets.clamp(self.budgets[0], self.budgets[-1])
        place = (budgets - self.budgets[0]) / (self.budgets[1] - self.budgets[0])
        knots = torch.arange(len(self.budgets), device=budgets.device)
        return (1 - (place[..., None] - knots).abs()).clamp(min=0)

    def validate(self) -> dict[str, float]:
        """Return divergence from the dense model, and spending, of the held-out blocks at three budgets."""
        if self.held_out is None:
            return {}
        figures: dict[str, float] = {}
        for budget in (self.options.least, (self.options.least + 1) / 2, 0.9):
            quality, spent = 0.0, 0.0
            for block in self.held_out.split(1):  # type: ignore[no-untyped-call]
                logits, tokens = self.run(block, torch.tensor([budget], device=block.device))
                quality += float(divergence(self.dense(block), logits))
                spent += float(tokens.mean())
            figures[f"kl at {budget:.2f}"] = quality / len(self.held_out)
            figures[f"spent at {budget:.2f}"] = spent / len(self.held_out)
        return figures

    def fitted(self) -> tuple[GateWeights, ShortcutWeights]:
        """Return what was trained. The shares are those of training; budgets are met once they are solved for."""
        shares = torch.special.ndtr(self.thresholds.detach())
        gate = GateWeights(self.weight.detach(), self.bias.detach(), self.mean, self.spread, self.budgets, shares)
        shortcuts = ShortcutWeights(self.down.detach(), self.up.detach(), self.shortcut_bias.detach())
        return gate, shortcuts


def _sum_before(values: Tensor, window: int) -> Tensor:
    """Return the sum of the ``window`` values before each of ``values`` [B, T], [B, T]: of fewer where there are."""
    before = values.cumsum(1) - values
    return before - nn.functional.pad(before, (window, 0))[:, : values.shape[1]]


def _normal(shares: Tensor) -> Tensor:
    """Return the quantiles of a normal distribution that have these shares below them."""
    return torch.special.ndtri(shares.clamp(_EDGE, 1 - _EDGE))
