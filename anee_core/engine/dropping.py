"""Token dropping in one layer: score, mask, attend, evict."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.cache.masks import additive, visible
from anee_core.engine.attention_tap import AttentionTap
from anee_core.engine.block import Block, Selection
from anee_core.engine.returned import check_kept, check_remembered
from anee_core.interfaces.cache_policy import CachePolicy, CacheView


@dataclass(frozen=True)
class DropPlace:
    """One layer that drops tokens of its own accord."""

    layer_idx: int
    """Index of the layer."""
    states: Tensor | None
    """[B, T, D] what its attention gets, normed; None for a policy that does not want them."""
    window: int | None
    """How many positions back the layer sees, itself included; None for all."""


class Drop:
    """What one layer drops because of one block.

    A policy that needs nothing from inside the layer decides before it runs; one that wants the keys or the attention
    of several tokens decides inside, between projection and attention; one that wants the keys because of a single
    token, after it. In each case a token attends to what was held when its turn came.

    Args:
        policy: what decides.
        block: the new tokens.
        cache: already holds slots for them.
        selection: which of them run the layer.
        place: which layer; None for all, under a policy that treats them alike.
    """

    def __init__(
        self,
        policy: CachePolicy,
        block: Block,
        cache: AdaptiveCache,
        selection: Selection,
        place: DropPlace | None = None,
    ) -> None:
        self._policy, self._cache, self._selection = policy, cache, selection
        self._all, place = place is None, place or DropPlace(0, None, None)
        self._layer_idx, self._window, states = place.layer_idx, place.window, place.states
        self._slots = cache.layers[self._layer_idx].slots
        device = self._slots.died.device if states is None else states.device
        self._positions = block.position_ids.to(device)
        real = torch.ones_like(self._positions, dtype=torch.bool) if block.real is None else block.real.to(device)
        view = CacheView(
            layer_idx=self._layer_idx,
            position_ids=self._slots.positions().to(device),
            valid=self._slots.valid().to(device),
            query_position=self._positions,
            ran=_ran(selection, real),
            real=real,
            state={},
            states=states,
        )
        if "keys" not in policy.wants:
            self._remember(view)
        self._view = replace(view, state=cache.state(self._layer_idx))
        self._tap: AttentionTap | None = None
        self._alive: Tensor | None = None
        self._changed: dict[str, Tensor] = {}
        several = self._positions.shape[1] > 1
        attends = selection.kind != "none"
        self._inside = attends and ("attention" in policy.wants or ("keys" in policy.wants and several))
        if not policy.wants & {"keys", "attention"}:
            self._decide(self._view)

    def visible(self) -> Tensor | None:
        """Return which of the layer's slots the policy lets each new token see, [B, T, S].

        None if that is not known yet, or hides nothing that the cache still holds.
        """
        if self._alive is None:
            return None
        if self._policy.before_attention:
            return self._alive
        # What a token drops, it has still seen.
        return _before(self._alive) if self._alive.shape[1] > 1 else None

    def around(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Return what the layer is to run in; ``dtype`` is that of its masks."""
        if not self._inside:
            return nullcontext()
        run = self._selection.run
        rows, tokens = self._positions.shape if run is None else (run[0].shape[0], run[1].shape[1])
        self._tap = AttentionTap(rows, tokens, self._slots.used, lambda logits: self._answer(logits, dtype))
        return self._tap

    @property
    def looks_inside(self) -> bool:
        """Whether the policy wants to see what happens inside the layer's attention."""
        return self._inside

    @property
    def flops(self) -> int:
        """FLOPs that looking at the attention took."""
        return 0 if self._tap is None else self._tap.flops

    def finish(self) -> Tensor:
        """Drop what is no longer wanted, now that the layer has run; return how many slots each token left, [B, T]."""
        if self._alive is None:
            self._decide(self._with_keys())
        assert self._alive is not None
        held = (self._alive & self._view.valid[:, None] & ~self._later).sum(2)
        self._cache.evict(
            None if self._all else self._layer_idx, self._alive.to(self._slots.died.device), self._changed
        )
        return held.to(self._slots.died.device)

    def _answer(self, look: Callable[[], Tensor], dtype: torch.dtype) -> Tensor | None:
        """Decide inside the layer and return the mask for the tokens that run."""
        view = self._with_keys() if "keys" in self._policy.wants else self._view
        seen = visible(self._slots, self._positions, self._window)
        run = self._selection.run
        if "attention" in self._policy.wants:
            logits = look()
            if run is not None:
                rows, columns = run
                whole = logits.new_zeros(*view.ran.shape, logits.shape[1], logits.shape[-1])
                whole[rows, columns] = logits.transpose(1, 2)
                logits = whole.transpose(1, 2)
            view = replace(view, attention=logits.masked_fill(~seen, -torch.inf))
        self._decide(view)
        known = self.visible()
        if known is None:
            return None
        mask = additive(seen & known[:, None], dtype)
        return mask if run is None else mask[run[0], 0, run[1]].unsqueeze(1)

    def _with_keys(self) -> CacheView:
        view = replace(self._view, keys=self._cache.keys_values(self._layer_idx)[0])
        if "keys" in self._policy.wants:
            self._remember(view)
            view = replace(view, state=self._cache.state(self._layer_idx))
        return view

    def _remember(self, view: CacheView) -> None:
        state = self._policy.remember(view)
        check_remembered(state, self._policy, (view.real.shape[0], view.real.shape[1]))
        self._cache.remember(self._layer_idx, state)

    def _decide(self, view: CacheView) -> None:
        keep, changed = self._policy.decide(view)
        batch, slots = view.valid.shape
        tokens = view.query_position.shape[1]
        check_kept(keep, self._policy, (batch, tokens, slots))
        check_remembered(changed, self._policy, (batch, slots))
        born = slots - tokens + torch.arange(tokens, device=keep.device)[:, None]
        places = torch.arange(slots, device=keep.device)
        self._later = places > born
        # Padding asks for nothing to be dropped; nor does a token drop itself, or one that is not there yet.
        asked = (keep | ~view.real[:, :, None] | (places >= born)).expand(batch, tokens, slots)
        self._alive = asked if tokens == 1 else asked.to(torch.uint8).cummin(1).values.bool()
        self._changed = dict(changed)


def _before(alive: Tensor) -> Tensor:
    """Return what was held before each token of a block dropped anything."""
    return torch.cat((torch.ones_like(alive[:, :1]), alive[:, :-1]), dim=1)


def _ran(selection: Selection, real: Tensor) -> Tensor:
    if selection.kind == "all":
        return real
    ran = torch.zeros_like(real)
    if selection.run is not None:
        rows, columns = selection.run
        ran[rows, columns] = True
    return ran
