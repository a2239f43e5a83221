"""The loop over layers: embed, then for each layer observe, decide, run or propagate; then final norm and head."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anee_core.accounting.budget import Budget
from anee_core.accounting.costs import CostModel
from anee_core.accounting.meter import Meter
from anee_core.accounting.trace import Step, Trace
from anee_core.adapter.layer_call import LayerCall
from anee_core.adapter.layout import Parts, attention_backend
from anee_core.adapter.model_adapter import ModelAdapter, cost_model
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.cache.masks import MaskMaker
from anee_core.cache.token_logs import FeedbackLog, ScoreLog
from anee_core.engine.block import ALL, Block, Selection
from anee_core.engine.dropping import Drop
from anee_core.engine.plan import Plan
from anee_core.errors import BudgetError
from anee_core.interfaces.setting import Calibration, Setting
from anee_core.interfaces.shortcut import Shortcut
from anee_core.policy.policy import Policy, budget_of
from anee_core.policy.profiler import distribution_signals
from anee_core.steps.calls import DropCall, Stack
from anee_core.steps.layer_step import LayerStep
from anee_core.steps.reference import ReferenceStep, devices_of


@dataclass(frozen=True)
class Output:
    """Final, normed hidden states [B, T, D]; what each token spent, [B, T], as a share of a dense token's layer FLOPs,
    for policies that feed it back, if it was asked to save; and, if wanted, the input of each layer followed by the
    final states.
    """

    hidden_states: Tensor
    spent: Tensor | None
    all_hidden_states: tuple[Tensor, ...] | None = None


class Engine:
    """Runs blocks of tokens through one model under one policy.

    Args:
        adapter: knows the model's family.
        parts: the model's modules.
        policy: what decides; the engine binds its parts to the model.
        budget: share of the dense decoder-layer FLOPs that may be spent, in (0, 1]; None for the policy's default.
        hard: whether no token may exceed the budget; otherwise it holds on average.
        calibration: what the controller needs to know of the model, if anything.
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
        budget: float | None = None,
        hard: bool = False,
        calibration: Calibration | None = None,
        step: LayerStep | None = None,
        costs: CostModel | None = None,
    ) -> None:
        self.adapter, self.parts = adapter, parts
        costs = replace(costs or cost_model(adapter, parts), shortcut=())
        limit = budget_of(policy, budget)
        if policy.controller.runs_all and limit is not None and limit < 1.0:
            raise BudgetError(
                f"policy '{policy}' runs every layer, so it cannot keep a budget of {limit:g}; "
                "choose one that skips layers, or leave the budget out"
            )
        hard = hard or policy.hard
        config = parts.config
        setting = Setting(
            costs,
            limit,
            hard,
            calibration or policy.calibration,
            width=config.hidden_size,
            dtype=parts.model.dtype,
            device=parts.embedding.weight.device,
            backbone=getattr(config, "anee_backbone", None),
        )
        shortcut = None if policy.shortcut is None else policy.shortcut.bind(setting)
        if shortcut is not None:
            costs = replace(costs, shortcut=tuple(shortcut.work(i) for i in range(costs.num_layers)))
            setting = replace(setting, costs=costs)
        self.costs = costs
        self.budget = Budget(costs, policy.controller.protected(costs.num_layers), limit, hard)
        controller = policy.controller.bind(setting)
        cache_policy = policy.cache_policy.bind(setting)
        self.policy = Policy(controller, cache_policy, policy.profiler, setting.calibration, limit, hard, shortcut)
        self._reference = ReferenceStep(adapter, parts)
        self.step = step or self._reference
        self._headed = parts
        """The parts, with the head that was used last."""
        self._devices = devices_of(parts)
        self._windows = [adapter.window(parts.config, i) for i in range(self.costs.num_layers)]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: the step gives it a head of its own."""
        return {**self.__dict__, "_headed": self.parts}

    def run(
        self, block: Block, cache: AdaptiveCache, trace: Trace, dense: bool = False, keep_states: bool = False
    ) -> Output:
        """Run one block; ``dense`` runs every layer and asks no policy.

        The cache is as before if anything fails.
        """
        adapter, parts = self.adapter, self.parts
        hidden_states = adapter.embed(parts, block.embeddings, block.position_ids)
        calls = adapter.begin(parts, hidden_states, block.position_ids)
        # Asked for each time: transformers lets it be changed.
        implicit_causal = attention_backend(parts.config) == "sdpa"
        masks = MaskMaker(block.position_ids, hidden_states.dtype, implicit_causal, parts.layout.always_masked)
        feedback = (
            self._feedback(cache, block, cache.seen).at(cache.seen) if self.policy.feeds_back and not dense else None
        )
        all_run = dense or self.policy.controller.runs_all
        scores = self._scores(cache, block, dense)
        plan = Plan(self.policy, self.budget, self.costs.num_layers, block, feedback, all_run, scores, cache.seen)
        tokens = block.position_ids.numel()
        meter = Meter(self.costs, self.policy.cache_policy.work, tokens, cache.seen + block.position_ids.shape[1])
        states = [hidden_states]
        previous = hidden_states
        held: list[Tensor] = []
        try:
            cache.begin(block.position_ids, block.real)
            self.step.begin(hidden_states, cache)
            shared = self._dropping_alike(block, cache)
            output = None
            if not keep_states:
                output, held = self._all_layers(hidden_states, calls, masks, cache, plan, meter, block, shared)
            for layer_idx in range(self.costs.num_layers if output is None else 0):
                hidden_states = hidden_states.to(self._devices[layer_idx])
                selection = plan.at(layer_idx, hidden_states, previous)
                previous = hidden_states
                drop = shared or self._dropping(layer_idx, hidden_states, block, selection, cache)
                hidden_states = self._layer(layer_idx, hidden_states, calls[layer_idx], masks, cache, selection, drop)
                meter.layer(*selection.counts(tokens), cache.slots[layer_idx].used)
                if drop is not None and drop is not shared:
                    held.append(drop.finish())
                    meter.policy(drop.flops)
                if keep_states:
                    states.append(hidden_states)
            if shared is not None:
                held = [shared.finish()] * self.costs.num_layers
            hidden_states = hidden_states if output is None else output
            hidden_states = self.step.norm(hidden_states.to(self._devices[-1]))
            holds = torch.stack(held) if held else cache.held_by_token()
            cache.commit()
        except BaseException:
            cache.abort()
            if not cache.seen:
                cache.reset()  # for whatever batch comes next
            raise
        real = torch.ones(block.position_ids.shape, dtype=torch.bool) if block.real is None else block.real.cpu()
        trace.add(Step(plan.ran(), real, meter, block.phase, dense, holds, cache.layer_nbytes()))
        spent = plan.spent if self.policy.feeds_back else None
        return Output(hidden_states, spent, (*states[:-1], hidden_states) if keep_states else None)

    def _all_layers(
        self,
        hidden_states: Tensor,
        calls: tuple[LayerCall, ...],
        masks: MaskMaker,
        cache: AdaptiveCache,
        plan: Plan,
        meter: Meter,
        block: Block,
        shared: Drop | None,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Take a block [B, T, D] through all layers at once, if the step can and nobody has a say in between.

        Return what comes out, or None if that cannot be; and, if tokens are dropped, what each layer then holds, one
        [B, 1] for each.
        """
        slots, call = cache.slots[0], calls[0]
        by_itself = shared is not None or self.policy.cache_policy.keeps_all
        dropping = None if by_itself else self._drop_call(block)
        possible = cache.alike if by_itself else dropping is not None
        if not (possible and self.step.takes_all and all(c is call for c in calls)):
            return None, []
        seen = None if shared is None else shared.visible()
        made: dict[int | None, Tensor | None] = dict.fromkeys(self._windows)
        for window in made if by_itself else ():
            made[window] = masks.at(slots, window) if seen is None else masks.mask(slots, window, seen)
        gate = plan.gate()
        states = plan.ahead(hidden_states) if gate is None else plan.undecided()
        if states is None:
            return None, []
        masked = [made[window] for window in self._windows]
        stack = Stack(call, masked, states, gate, dropping, self.policy.shortcut)
        output = self.step.all_layers(hidden_states, stack, cache)
        if output is None:
            return None, []
        plan.follow(states, gate)
        meter.layers(states, [s.used for s in cache.slots])
        return output, [] if dropping is None else list(dropping.held[:, :, None].long())

    def _drop_call(self, block: Block) -> DropCall | None:
        """Return what drops tokens inside the step, if that is an interaction and every row has one new token."""
        interaction = self.policy.cache_policy.interaction
        single = block.real is None and block.position_ids.shape[1] == 1
        if interaction is None or not single or any(window is not None for window in self._windows):
            return None
        held = torch.empty(self.costs.num_layers, len(block.position_ids), dtype=torch.int32)
        return DropCall(interaction, held)

    def _layer(
        self,
        layer_idx: int,
        hidden_states: Tensor,
        call: LayerCall,
        masks: MaskMaker,
        cache: AdaptiveCache,
        selection: Selection,
        drop: Drop | None,
    ) -> Tensor:
        slots, window, device = cache.slots[layer_idx], self._windows[layer_idx], self._devices[layer_idx]
        shortcut = self.policy.shortcut
        if device != call.position_ids.device:
            call = call.to(device)
        step = self._reference if drop is not None and drop.looks_inside else self.step
        result = hidden_states
        if selection.kind != "all":
            # First, so that later tokens of the block see their keys and values.
            step.propagate(layer_idx, hidden_states, call, cache, selection.skip)
            if shortcut is not None:
                result = _take_shortcut(shortcut, layer_idx, hidden_states, selection.skip)
        if selection.kind == "none":
            return result
        subset = selection.kind == "some"
        held = None if drop is None else drop.visible()
        needed = held is not None or masks.needed(slots, window, subset)
        mask = masks.mask(slots, window, held).to(device) if needed else None
        with nullcontext() if drop is None else drop.around(hidden_states.dtype):
            output = step.run(layer_idx, hidden_states, call, cache, selection.run, mask)
        if selection.run is None:
            return output
        rows, columns = selection.run
        return result.index_put((rows.expand_as(columns), columns), output)

    def _dropping_alike(self, block: Block, cache: AdaptiveCache) -> Drop | None:
        """Return what all layers drop, if the policy treats them alike and they hold the same tokens."""
        policy = self.policy.cache_policy
        possible = policy.alike and not policy.wants and cache.alike
        return Drop(policy, None, None, block, ALL, cache, None) if possible else None

    def _dropping(
        self, layer_idx: int, hidden_states: Tensor, block: Block, selection: Selection, cache: AdaptiveCache
    ) -> Drop | None:
        """Return what a layer drops; None under a policy that keeps all tokens."""
        policy = self.policy.cache_policy
        if policy.keeps_all:
            return None
        wanted = "states" in policy.wants
        states = self.adapter.attention_input(self.parts, layer_idx, hidden_states) if wanted else None
        return Drop(policy, layer_idx, states, block, selection, cache, self._windows[layer_idx])

    def logits(self, hidden_states: Tensor, trace: Trace) -> Tensor:
        """Apply the head to normed hidden states [B, T, D] and charge it to the last step."""
        batch, tokens = hidden_states.shape[:2]
        trace.steps[-1].meter.head(batch * tokens)
        head = self.step.head(hidden_states)
        if self._headed.head is not head:
            self._headed = replace(self.parts, head=head)
        return self.adapter.logits(self._headed, hidden_states)

    def feed_back(self, block: Block, cache: AdaptiveCache, output: Output, logits: Tensor) -> None:
        """Record the outcome of a block for the policy's next decision.

        ``logits`` [B, V] come from each row's last real token. A prompt read densely counts as having cost just the
        budget.
        """
        spent = output.spent
        if spent is None:
            spent = torch.full(block.position_ids.shape, self.budget.limit or 1.0, device=logits.device)
        index = cache.seen - spent.shape[1]
        self._feedback(cache, block, index).note(index, spent, distribution_signals(logits), block.real)

    def _scores(self, cache: AdaptiveCache, block: Block, dense: bool) -> ScoreLog | None:
        """Return where scores are kept; None if the controller compares no tokens, or is not asked."""
        if not self.policy.controller.compares:
            return None
        batch, tokens = block.position_ids.shape
        if cache.scores is None:
            cache.scores = ScoreLog(batch, self.costs.num_layers, block.position_ids.device, cache.seen)
        if dense:
            cache.scores.skip(cache.seen, tokens)
            return None
        return cache.scores

    def _feedback(self, cache: AdaptiveCache, block: Block, start: int) -> FeedbackLog:
        if cache.feedback is None:
            batch, device = block.position_ids.shape[0], block.position_ids.device
            cache.feedback = FeedbackLog(batch, device, start, self.budget.limit or 1.0)
        return cache.feedback


def _take_shortcut(
    shortcut: Shortcut, layer_idx: int, hidden_states: Tensor, places: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Return hidden states [B, T, D] with the shortcut's estimate added, to all or to those at ``places``."""
    if places is None:
        return hidden_states + shortcut.estimate(layer_idx, hidden_states)
    skipped = hidden_states[places]
    return hidden_states.index_put(places, skipped + shortcut.estimate(layer_idx, skipped))
