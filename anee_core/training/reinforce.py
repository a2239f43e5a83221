"""REINFORCE on a gate: decisions are drawn, rewarded by what the model then says, and made likelier or less likely.

The estimator is that of Williams (1992); the baseline of a rollout is the mean of the others on the same text
(leave-one-out; Kool et al., 2019). What supervised training only approximates is exact here: hard decisions, their real
cost, and the divergence that they cause together. Nothing is differentiated but the gate itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from anee_core.accounting.budget import SLACK
from anee_core.evaluation.divergence import divergences
from anee_core.training.gate import GatedModel
from anee_core.training.objective import Objective
from anee_core.training.options import ReinforceOptions


class Reinforce(Objective):
    """The gate of a `GatedModel` under REINFORCE; its shortcuts stay as they are.

    A token's reward is minus its divergence from the dense model, and minus what it spends beyond its budget times the
    budget's price; spending less is rewarded only where the divergence is small.
    """

    def __init__(self, gated: GatedModel, options: ReinforceOptions) -> None:
        super().__init__()
        self.gated, self.options = gated, options
        for name in ("down", "up", "shortcut_bias"):
            getattr(gated, name).requires_grad_(False)
        self._entropy = options.entropy
        self.price: Tensor
        self.register_buffer("price", gated.price.clone())

    def begin(self, step: int) -> None:
        """Let the weight of the entropy fall."""
        self._entropy = self.options.entropy * max(1 - step / self.options.steps, 0.0)

    def adapted(self) -> dict[str, Tensor]:
        """Return its own prices, and the statistics of the gate's scores."""
        return {**super().adapted(), **{f"gated.{name}": known for name, known in self.gated.adapted().items()}}

    def forward(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of token ids [B, T], whose gradient is the estimate."""
        gated, options = self.gated, self.options
        budgets = gated.draw_budgets(input_ids)
        with torch.no_grad():
            wanted = gated.dense(input_ids)
        hard = torch.rand(input_ids.shape[0], device=input_ids.device) < options.hard
        rollouts = [self.rollout(input_ids, budgets, hard) for _ in range(options.rollouts)]
        price = (gated.near(budgets) @ self.price)[:, None]
        rewards, losses = [], []
        for logits, spent, _, _ in rollouts:
            divergence = divergences(wanted, logits)
            over = spent - budgets[:, None]
            counted = torch.where((over > 0) | (divergence < options.near_dense), over, 0.0)
            rewards.append(-divergence - price * counted)
            losses.append(divergence)
        reward = torch.stack(rewards)  # [K, B, T]
        baseline = (reward.sum(0, keepdim=True) - reward) / (options.rollouts - 1)
        advantage = reward - baseline
        log_chance = torch.stack([chosen for _, _, chosen, _ in rollouts])
        entropy = torch.stack([left for _, _, _, left in rollouts]).mean()
        loss = -(log_chance * advantage).mean() - self._entropy * entropy
        spent = torch.stack([tokens for _, tokens, _, _ in rollouts])
        over = spent.mean((0, 2)) - budgets
        if not hard.all():  # those that are hard say nothing about the price
            gated.move_price(self.price, budgets[~hard], over[~hard])
        figures = {
            "reward": reward.mean(), "quality": torch.stack(losses).mean(), "spent": spent.mean(),
            "over": over.mean(), "entropy": entropy.detach(),
        }  # fmt: skip
        return loss, figures

    def rollout(self, input_ids: Tensor, budgets: Tensor, hard: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw decisions for token ids [B, T] under ``budgets`` [B], of which some are ``hard`` [B].

        Return logits [B, T, V]; what each token spends of a dense one's FLOPs, the logarithm of the chance of its
        decisions, and their entropy, summed over layers, all [B, T]. Only the last two carry gradients. Under a hard
        budget a layer that cannot be paid for is skipped as `Ledger.admit` would, and nobody decided that.
        """
        gated = self.gated
        walk = gated.walk(input_ids, frozen=True)
        thresholds = gated.thresholds_of(budgets, walk.positions)
        log_chance, entropy = torch.zeros_like(walk.spent), torch.zeros_like(walk.spent)
        late = walk.positions >= gated.first
        skippable = torch.tensor(gated.free, device=input_ids.device)[:, None]
        wanted = torch.where(skippable, walk.skip_shares, walk.run_shares).sum(0) + torch.zeros_like(walk.spent)
        limits = torch.where(hard, budgets + SLACK, torch.inf)[:, None]
        for visit in walk.visits():
            layer_idx = visit.layer_idx
            logit = (gated.score(visit.unit.float(), layer_idx) - thresholds[..., layer_idx]) / self.options.temperature
            keep = (torch.rand_like(logit) < logit.sigmoid()) | ~late
            extra = walk.run_shares[layer_idx] - walk.skip_shares[layer_idx]
            affordable = wanted + extra <= limits
            wanted = wanted + keep * extra
            decided = late & affordable
            log_chance = log_chance + decided * functional.logsigmoid(torch.where(keep, logit, -logit))
            entropy = entropy + decided * (functional.softplus(logit) - logit * logit.sigmoid())
            with torch.no_grad():
                estimate = gated.estimate(layer_idx, visit.unit)
            walk.go_on(visit, keep & affordable, estimate)
        return walk.logits(), walk.spent, log_chance, entropy

    def validate(self) -> dict[str, float]:
        """Return what the gated model does, as deployed."""
        return self.gated.validate()
