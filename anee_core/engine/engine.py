"""Run blocks of tokens through one model under one policy: layers, final norm, head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anee_core.accounting.budget import Budget
from anee_core.accounting.costs import CostModel
from anee_core.accounting.trace import Trace
from anee_core.adapter.layout import Parts
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.engine.block import Block
from anee_core.engine.bound import Terms, bind
from anee_core.engine.forward import Forward
from anee_core.engine.past import feedback_log
from anee_core.policy.policy import Policy
from anee_core.policy.profiler import distribution_signals
from anee_core.steps.layer_step import LayerStep


@dataclass(frozen=True)
class Output:
    """What a forward gives."""

    hidden_states: Tensor
    """[B, T, D] final hidden states, normed."""
    spent: Tensor | None
    """[B, T] what each token spent, as a share of a dense token's layer FLOPs; None unless the policy feeds it back."""
    inputs: tuple[Tensor, ...] = ()
    """What each layer got, [B, T, D]; empty unless that was to be kept."""


class Engine:
    """What runs blocks of tokens through one model under one policy.

    Args:
        adapter: knows the model's family.
        parts: the model's modules.
        policy: what decides; the engine binds its parts to the model.
        terms: the budget, and what calibration found.
        step: how layers are run; None for the model's own modules.
        costs: what the model's parts cost, if that is known already.

    Raises:
        PolicyError, BudgetError: policy, budget and model do not fit together.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        parts: Parts,
        policy: Policy,
        terms: Terms | None = None,
        step: LayerStep | None = None,
        costs: CostModel | None = None,
    ) -> None:
        self._bound = bind(adapter, parts, policy, terms or Terms(), step, costs)
        self._headed = parts
        """The parts, with the head that was used last."""

    @property
    def policy(self) -> Policy:
        """The policy, bound to the model."""
        return self._bound.policy

    @property
    def budget(self) -> Budget:
        """What a token may spend."""
        return self._bound.budget

    @property
    def costs(self) -> CostModel:
        """What the model's parts cost."""
        return self._bound.costs

    @property
    def step(self) -> LayerStep:
        """How layers are run."""
        return self._bound.step

    @property
    def differentiates(self) -> bool:
        """Whether autograd records what runs now, so that a block has to be run in one piece."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self._bound.parts.model.parameters())

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: the step gives it a head of its own."""
        return {**self.__dict__, "_headed": self._bound.parts}

    def run(
        self, block: Block, cache: AdaptiveCache, trace: Trace, dense: bool = False, keep_inputs: bool = False
    ) -> Output:
        """Run one block; ``dense`` runs every layer and asks no policy, ``keep_inputs`` keeps what each layer gets.

        The cache is as before if anything fails.
        """
        forward = Forward(self._bound, block, cache, dense)
        try:
            forward.begin()
            hidden_states = None if keep_inputs else forward.all_at_once()
            if hidden_states is None:
                hidden_states = forward.layer_by_layer(keep_inputs)
            hidden_states = self.step.norm(hidden_states.to(self._bound.devices[-1]))
            record, spent = forward.finish()
        except BaseException:
            cache.abort()
            if not cache.seen:
                cache.reset()  # for whatever batch comes next
            raise
        trace.add(record)
        return Output(hidden_states, spent, tuple(forward.inputs))

    def logits(self, hidden_states: Tensor, trace: Trace) -> Tensor:
        """Apply the head to normed hidden states [B, T, D] and charge it to the last step."""
        batch, tokens = hidden_states.shape[:2]
        trace.steps[-1].meter.head(batch * tokens)
        head = self.step.head(hidden_states)
        if self._headed.head is not head:
            self._headed = replace(self._bound.parts, head=head)
        return self._bound.adapter.logits(self._headed, hidden_states)

    def feed_back(self, block: Block, cache: AdaptiveCache, output: Output, logits: Tensor) -> None:
        """Record the outcome of a block for the policy's next decision.

        ``logits`` [B, V] come from each row's last real token. A prompt read densely counts as having cost just the
        budget.
        """
        spent = output.spent
        if spent is None:
            spent = torch.full(block.position_ids.shape, self.budget.limit or 1.0, device=logits.device)
        index = cache.seen - spent.shape[1]
        log = feedback_log(self._bound, block, cache, index)
        log.record(index, spent, distribution_signals(logits), block.real)
