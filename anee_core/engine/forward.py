"""One block on its way through the layers: embedded, then observed, decided on, run or propagated at each of them."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from anee_core.accounting.meter import Meter
from anee_core.accounting.trace import Step
from anee_core.adapter.layout import attention_backend
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.cache.masks import MaskMaker
from anee_core.cache.writer import gradient_once
from anee_core.engine.block import ALL, Block, Selection
from anee_core.engine.bound import Bound
from anee_core.engine.dropping import Drop, DropPlace
from anee_core.engine.past import past_of
from anee_core.engine.plan import Plan
from anee_core.errors import InputError
from anee_core.interfaces.shortcut import Shortcut
from anee_core.policy.policy import Policy
from anee_core.steps.calls import DropCall, LayerInput, Places, Stack


class Forward:
    """The state of one forward.

    Args:
        bound: model, policy and step.
        block: the new tokens.
        cache: gets their keys and values.
        dense: whether every layer runs and no policy is asked.
    """

    def __init__(self, bound: Bound, block: Block, cache: AdaptiveCache, dense: bool) -> None:
        self._bound, self._block, self._cache, self._dense = bound, block, cache, dense
        adapter, parts = bound.adapter, bound.parts
        self._cacheless = parts.checkpoints_gradients
        """Whether layers compute without the cache."""
        if self._cacheless and (cache.seen or bound.policy.cache_policy.wants & {"keys", "attention"}):
            raise _needs_cache(bound.policy)
        self._embedded = adapter.embed(parts, block.embeddings, block.encoded_positions)
        self._calls = adapter.begin(parts, self._embedded, block.encoded_positions)
        # Asked for each time: transformers lets it be changed.
        causal = attention_backend(parts.config) == "sdpa"
        self._masks = MaskMaker(block.position_ids, self._embedded.dtype, causal, parts.layout.always_masked)
        all_run = dense or bound.policy.controller.runs_all
        self._plan = Plan(bound.policy, bound.budget, block, past_of(bound, block, cache, dense), all_run)
        context = cache.seen + block.position_ids.shape[1]
        self._meter = Meter(bound.costs, bound.policy.cache_policy.work, block.position_ids.shape, context)
        self._shared: Drop | None = None
        """What all layers drop, if they drop the same."""
        self._held: list[Tensor] = []
        """Slots that each layer held after each token, [B, T], as far as layers have dropped of their own accord."""
        self.inputs: list[Tensor] = []
        """What each layer got, [B, T, D], if that was to be kept."""

    def begin(self) -> None:
        """Hand out slots, and let the step prepare."""
        self._cache.begin(self._block.position_ids, self._block.real)
        self._bound.step.begin(self._embedded, self._cache)
        policy = self._bound.policy.cache_policy
        if policy.alike and not policy.wants and self._cache.alike:
            self._shared = Drop(policy, self._block, self._cache, ALL)

    def all_at_once(self) -> Tensor | None:
        """Take the block through all layers in one call of the step, and return what comes out, [B, T, D].

        None if the step cannot do that, or somebody has a say in between.
        """
        bound, cache, call = self._bound, self._cache, self._calls[0]
        dropping = self._drop_call()
        masked = self._shared is not None or bound.policy.cache_policy.keeps_all
        possible = cache.alike if masked else dropping is not None
        if not (possible and bound.step.takes_all and all(other is call for other in self._calls)):
            return None
        gate = self._plan.gate()
        states = self._plan.decide_all(self._embedded) if gate is None else self._plan.undecided()
        if states is None:
            return None
        masks = self._masks_of_all() if masked else [None] * bound.num_layers
        stack = Stack(call, masks, states, gate, dropping, bound.policy.shortcut)
        output = bound.step.all_layers(self._embedded, stack, cache)
        if output is None:
            return None
        if gate is not None:
            self._plan.record(states)
        self._meter.layers(states, [layer.slots.used for layer in cache.layers])
        if dropping is not None:
            self._held = list(dropping.held[:, :, None].long())
        return output

    def layer_by_layer(self, keep_inputs: bool) -> Tensor:
        """Take the block through the layers one after another, and return what comes out, [B, T, D]."""
        bound, shape = self._bound, self._block.position_ids.shape
        hidden_states = previous = self._embedded
        for layer_idx in range(bound.num_layers):
            if keep_inputs:
                self.inputs.append(hidden_states)
            hidden_states = hidden_states.to(bound.devices[layer_idx])
            selection = self._plan.select(layer_idx, hidden_states, previous)
            previous = hidden_states
            drop = self._shared or self._own_drop(layer_idx, hidden_states, selection)
            hidden_states = self._layer(layer_idx, hidden_states, selection, drop)
            self._meter.layer(*selection.counts(*shape), self._cache.layers[layer_idx].slots.used)
            if drop is not None and drop is not self._shared:
                self._held.append(drop.finish())
                self._meter.policy(drop.flops)
        return hidden_states

    def finish(self) -> tuple[Step, Tensor | None]:
        """Drop what is no longer wanted and end the forward in the cache.

        Return the record of it, and what each token spent, [B, T], for a policy that feeds that back.
        """
        bound, block, cache = self._bound, self._block, self._cache
        if self._shared is not None:
            self._held = [self._shared.finish()] * bound.num_layers
        held = torch.stack(self._held) if self._held else cache.held_by_token()
        cache.commit()
        real = torch.ones(block.position_ids.shape, dtype=torch.bool) if block.real is None else block.real.cpu()
        step = Step(self._plan.ran(), real, self._meter, block.phase, self._dense, held, cache.layer_nbytes())
        return step, self._plan.spent if bound.policy.feeds_back else None

    def _layer(self, layer_idx: int, hidden_states: Tensor, selection: Selection, drop: Drop | None) -> Tensor:
        """Run one layer for the tokens that are to run it, and propagate for the others."""
        bound, cache, call = self._bound, self._cache, self._calls[layer_idx]
        slots, device = cache.layers[layer_idx].slots, bound.devices[layer_idx]
        if device != call.position_ids.device:
            call = call.to(device)
        step = bound.reference if drop is not None and drop.looks_inside else bound.step
        result = hidden_states
        if selection.kind == "some" and self._cacheless:
            raise _needs_cache(bound.policy)
        if selection.kind != "all":
            # First, so that later tokens of the block see their keys and values.
            if not self._cacheless:
                step.propagate(LayerInput(layer_idx, hidden_states, call, cache, selection.skip))
            if bound.policy.shortcut is not None:
                result = _take_shortcut(bound.policy.shortcut, layer_idx, hidden_states, selection.skip)
        if selection.kind == "none":
            return result
        alive = None if drop is None else drop.visible()
        window = bound.windows[layer_idx]
        needed = alive is not None or self._masks.needed(slots, window, selection.kind == "some")
        mask = self._masks.mask(slots, window, alive).to(device) if needed else None
        with nullcontext() if drop is None else drop.around(hidden_states.dtype):
            output = step.run(LayerInput(layer_idx, hidden_states, call, cache, selection.run), mask)
        if selection.run is None:
            return output
        rows, columns = selection.run
        return result.index_put((rows.expand_as(columns), columns), gradient_once(output, columns, dim=1))

    def _own_drop(self, layer_idx: int, hidden_states: Tensor, selection: Selection) -> Drop | None:
        """Return what a layer drops of its own accord; None under a policy that keeps all tokens."""
        bound = self._bound
        policy = bound.policy.cache_policy
        if policy.keeps_all:
            return None
        wanted = "states" in policy.wants
        states = bound.adapter.attention_input(bound.parts, layer_idx, hidden_states) if wanted else None
        place = DropPlace(layer_idx, states, bound.windows[layer_idx])
        return Drop(policy, self._block, self._cache, selection, place)

    def _drop_call(self) -> DropCall | None:
        """Return what drops tokens inside the step, if that is an interaction and every row has one new token."""
        bound, block = self._bound, self._block
        interaction = bound.policy.cache_policy.interaction
        single = block.real is None and block.position_ids.shape[1] == 1
        if interaction is None or not single or any(window is not None for window in bound.windows):
            return None
        held = torch.empty(bound.num_layers, len(block.position_ids), dtype=torch.int32)
        return DropCall(interaction, held)

    def _masks_of_all(self) -> list[Tensor | None]:
        """Return each layer's mask, where all layers hold the same slots and all tokens may run."""
        slots = self._cache.layers[0].slots
        alive = None if self._shared is None else self._shared.visible()
        made: dict[int | None, Tensor | None] = {}
        for window in dict.fromkeys(self._bound.windows):
            needed = alive is not None or self._masks.needed(slots, window, subset=False)
            made[window] = self._masks.mask(slots, window, alive) if needed else None
        return [made[window] for window in self._bound.windows]


def _take_shortcut(shortcut: Shortcut, layer_idx: int, hidden_states: Tensor, places: Places | None) -> Tensor:
    """Return hidden states [B, T, D] with the shortcut's estimate added, to all or to those at ``places``."""
    if places is None:
        return hidden_states + shortcut.estimate(layer_idx, hidden_states)
    skipped = hidden_states[places]
    return hidden_states.index_put(places, skipped + shortcut.estimate(layer_idx, skipped))


def _needs_cache(policy: Policy) -> InputError:
    return InputError(
        f"policy '{policy}' cannot be trained with gradient checkpointing, under which layers have no cache: call "
        "model.gradient_checkpointing_disable() or model.eval(), or give whole sequences to a policy that skips layers "
        "for all tokens alike"
    )
