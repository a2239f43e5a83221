"""The key/value cache: one object that owns lengths, positions, validity, dropping and rollback."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from anee_core.adapter.layer_call import LayerCall
from anee_core.cache.arguments import check_rollback, check_rows, checked_capacity
from anee_core.cache.debts import Debt, Debts
from anee_core.cache.layer_store import Extent, LayerStore
from anee_core.cache.remembered import Remembered
from anee_core.cache.slots import Slots
from anee_core.cache.token_logs import FeedbackLog, ScoreLog
from anee_core.cache.transformers_names import TransformersNames
from anee_core.errors import CacheError

_FIRST_CAPACITY = 64
_LOAD_FACTOR = 0.9
"""Compact a layer whose fullest row holds less than this share of the used slots."""
_SLACK = 16
"""Free slots beyond those that fill up until the next compaction."""

SettleWith = Callable[["AdaptiveCache", int, Tensor, LayerCall, Tensor], None]
"""A function that writes keys and values that are owed: cache, layer, hidden states [B, P, D], call, slots [P]."""


class AdaptiveCache(TransformersNames):
    """Keys and values of all layers, with per-slot positions and validity.

    ``seen`` is the logical length: tokens read, what `get_seq_length` reports. The slots held are another number,
    per layer and row. A forward is `begin` (hand out slots), `write` for each layer, `commit`.

    Whatever is allocated is allocated outside inference mode, so that a prompt read in it can be continued outside.
    """

    def __init__(self, num_layers: int, capacity: int | None = None) -> None:
        self._extent = Extent(capacity=checked_capacity(capacity))
        nothing = Slots.nothing()
        super().__init__(layers=[LayerStore(self._extent, nothing) for _ in range(num_layers)])
        self.feedback: FeedbackLog | None = None
        """What is known of each row's own output; None until a policy that feeds back asks."""
        self.scores: ScoreLog | None = None
        """What each token was given at each layer; None until a policy that compares tokens asks."""
        self.keeps_dropped = False
        """Whether dropped slots stay, so that a rollback can bring them back."""
        self.settle_with: SettleWith | None = None
        """What writes keys and values that layers are owed; None where nothing is put off."""
        self.debts = Debts()
        self._remembered = Remembered(self.layers)
        self._sets: list[Slots] = []
        """Each distinct `Slots` once; empty if that has to be found out."""
        self._starts: list[int] = []
        """Slot of the current block's first token, in each layer."""
        self._pending = 0
        """Tokens of the forward under way."""
        self._grown = False
        """Whether slots have grown, and the storage has not yet."""
        self._attached = False
        """Whether keys or values that were written carry a gradient."""
        self._horizon = 0
        """Number of tokens seen at the last drop whose slots are freed."""
        self._final = 0
        """Number of tokens seen up to which drops are not to be taken back."""

    @property
    def seen(self) -> int:
        """Number of tokens read, dropped ones included."""
        return self._extent.seen

    @property
    def batch(self) -> int:
        """Number of rows; 0 before the first forward."""
        return self._extent.batch

    @property
    def slots(self) -> list[Slots]:
        """Which tokens each layer holds; none before the first forward."""
        return [layer.slots for layer in self.layers] if self._extent.batch else []

    # One forward.

    @torch.inference_mode(False)
    def begin(self, position_ids: Tensor, real: Tensor | None) -> None:
        """Hand out slots for tokens [B, T] in every layer; ``real`` [B, T] is False for padding.

        Raises:
            CacheError: the batch size is not that of the cache.
        """
        batch, count = position_ids.shape
        extent = self._extent
        if not extent.batch:
            extent.batch, extent.capacity = batch, max(extent.capacity, count)
            shared = Slots(batch, position_ids.device, extent.capacity)
            for layer in self.layers:
                layer.slots = shared
            self._sets = [shared]
        self.check_batch(batch)
        self.abort()
        for slots in self._distinct():
            needed = slots.used + count
            if needed > slots.capacity:
                # Doubling would undo what dropping saves: what is dropped will make room again.
                room = slots.capacity * 5 // 4 if slots.gaps else 2 * slots.capacity
                slots.grow(max(room, needed, _FIRST_CAPACITY))
                self._grown = True  # until the storage follows, which may fail
        if self._grown:
            extent.capacity = max(slots.capacity for slots in self._distinct())
            for layer in self.layers:
                layer.grow()
            self._grown = False
        # Last: if memory runs out above, no slot has been handed out.
        starts = {id(slots): slots.extend(position_ids, real, extent.seen) for slots in self._distinct()}
        self._starts = [starts[id(layer.slots)] for layer in self.layers]
        self._pending = count

    def check_batch(self, batch: int) -> None:
        """Raise `CacheError` if the cache holds another number of rows."""
        if self.batch and batch != self.batch:
            held = f"the cache holds {self.batch} rows and got {batch}"
            raise CacheError(f"{held}: start a new cache, or reorder this one")

    def span(self, layer_idx: int) -> tuple[int, int]:
        """Return the slot of the current block's first token in one layer, and the number of slots handed out."""
        return self._starts[layer_idx], self.layers[layer_idx].slots.used

    def write(
        self, layer_idx: int, keys: Tensor, values: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> None:
        """Store keys and values [R, H, C, Dh] of the current block's tokens: all, or those at rows x columns."""
        start = self._starts[layer_idx]
        for target, new in zip(self._targets(layer_idx, keys, values), (keys, values), strict=True):
            if rows is None:
                target.narrow(2, start, new.shape[2]).copy_(new)
            else:
                assert columns is not None
                target[rows, :, columns + start] = new.transpose(1, 2)

    def write_slots(self, layer_idx: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Store keys and values [B, H, P, Dh] in slots [P]."""
        for target, new in zip(self._targets(layer_idx, keys, values), (keys, values), strict=True):
            target.index_copy_(2, slots.to(new.device), new)

    def _targets(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return where one layer's keys and values lie, [B, H, capacity, Dh], for some like these to be written."""
        store = self.layers[layer_idx]
        if store.keys is None:
            store.lazy_initialization(keys, values)
        # Either alone may carry a gradient: where only the values are trained, the first layer's keys do not.
        self._attached = self._attached or keys.requires_grad or values.requires_grad
        return store.keys, store.values

    def keys_values(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return one layer's keys and values, [B, H, S, Dh]."""
        self.settle(layer_idx)
        return cast(tuple[Tensor, Tensor], self.layers[layer_idx].keys_values())

    def owe(self, layer_idx: int, hidden_states: Tensor, call: LayerCall) -> int:
        """Note that the current tokens [B, 1, D] skipped a layer and have no keys and values there yet.

        Return how many slots of a row have none by now.
        """
        return self.debts.add(layer_idx, Debt(self._starts[layer_idx], hidden_states, call))

    def settle(self, layer_idx: int) -> None:
        """Write the keys and values that are owed to a layer."""
        if not self.debts.count(layer_idx):
            return
        assert self.settle_with is not None
        with torch.no_grad():
            self.settle_with(self, layer_idx, *self.debts.joined(layer_idx))
        self.debts.drop(layer_idx)

    def settle_all(self) -> None:
        """Write all keys and values that are owed."""
        for layer_idx in self.debts.layers():
            self.settle(layer_idx)

    def remember(self, layer_idx: int, state: Mapping[str, Tensor]) -> None:
        """Store what a policy wants to know later of the current block's tokens, by name, [B, T, ...]."""
        self._remembered.append(layer_idx, self._starts[layer_idx], state)

    def state(self, layer_idx: int) -> dict[str, Tensor]:
        """Return what is remembered of one layer's slots, [B, S, ...]."""
        return self._remembered.view(layer_idx)

    @torch.inference_mode(False)
    def dropping(self, name: str, width: int, like: Tensor) -> list[tuple[Slots, Tensor]]:
        """Return each layer's slots and what is remembered of them under a name, for a step that drops tokens.

        Both are written by the step. What is remembered is [B, capacity, width], in the dtype of ``like``.
        """
        found = []
        for layer_idx in range(len(self.layers)):
            slots = self._own_slots(layer_idx)
            slots.full, slots.evicting, slots.gaps = False, True, True
            found.append((slots, self._remembered.storage(layer_idx, name, (width,), like)))
        return found

    @torch.inference_mode(False)
    def evict(self, layer_idx: int | None, alive: Tensor, state: Mapping[str, Tensor] | None = None) -> None:
        """Drop slots of one layer, or for None of all layers, which are `alike` then; memory is freed by `commit`.

        ``alive`` [B, T, S] says what is held after each of the T newest tokens. ``state`` is what is remembered of one
        layer from now on, [B, S, ...].
        """
        slots = self.layers[0].slots if layer_idx is None else self._own_slots(layer_idx)
        if not self._pending:
            # Outside a forward: what is dropped now is not final before the next one, unlike what was dropped before.
            self._horizon, self._final = self._last_final_drop(), min(self._final, self.seen - 1)
        slots.evict(alive, self.seen + self._pending)
        if state:
            assert layer_idx is not None
            self._remembered.stage(layer_idx, state)

    @property
    def alike(self) -> bool:
        """Whether all layers hold the same tokens in the same slots."""
        return len(self._distinct()) <= 1

    def _own_slots(self, layer_idx: int) -> Slots:
        """Return a layer's slots, which no other layer shares from now on."""
        slots: Slots = self.layers[layer_idx].slots
        if any(layer.slots is slots for i, layer in enumerate(self.layers) if i != layer_idx):
            slots = self.layers[layer_idx].slots = slots.clone()
            self._sets = []
        return slots

    @torch.inference_mode(False)
    def commit(self) -> None:
        """End the forward: its tokens count as seen; dropped slots are freed unless the cache `keeps_dropped`."""
        replaced = self._remembered.staged
        if self._remembered.commit(self.seen, self.keeps_dropped):
            self._horizon = self.seen + (self._pending if replaced else 0)
        self._extent.seen += self._pending
        self._pending = 0
        self._detach()
        if not self.keeps_dropped:
            self._final = self.seen
            self._free()

    def abort(self) -> None:
        """Take back the slots of a forward that did not reach `commit`."""
        if self._pending:
            self.debts.abort(self._starts)
            for slots in self._distinct():
                slots.rollback(self.seen, self.seen + self._pending)
            self._pending = 0
            self._remembered.abort()
            self._detach()

    def _detach(self) -> None:
        """Let go of the autograd graph of the forward that wrote last."""
        if self._attached:
            for layer in self.layers:
                layer.detach()
        self._attached = False

    def _distinct(self) -> list[Slots]:
        """Return each set of slots once, however many layers share it."""
        if not self._sets:
            self._sets = list({id(slots): slots for slots in self.slots}.values())
        return self._sets

    def _free(self) -> None:
        """Compact the layers that have dropped enough for it to be worth while."""
        due = [slots for slots in self._distinct() if slots.evicting and slots.used >= slots.check_at]
        if not due:
            return
        # The one host read of a forward that frees: for each of them, its fullest and emptiest row and last drop.
        figures = []
        for slots in due:
            held = slots.held()
            figures.append(torch.stack((held.max(), held.min(), slots.last_drop(self.seen))))
        for slots, (most, least, dropped) in zip(due, torch.stack(figures).tolist(), strict=True):
            slots.check_at = int(most / _LOAD_FACTOR) + _SLACK
            if most < _LOAD_FACTOR * slots.used:
                self._horizon = max(self._horizon, dropped)
                self._compact(slots, most, least)

    def _compact(self, slots: Slots, most: int, least: int) -> None:
        """Move what is held to the front, in all layers with these slots: ``least`` to ``most`` tokens of a row."""
        sharing = [i for i, layer in enumerate(self.layers) if layer.slots is slots]
        for layer_idx in sharing:
            self.settle(layer_idx)
        try:
            source = slots.compact(max(most, 1), slots.check_at, full=most == least > 0)
            for layer_idx in sharing:
                self.layers[layer_idx].compact(source)
        except BaseException:
            self.reset()  # some layers have moved, and others not
            raise

    # Between forwards.

    def rollback(self, count: int) -> None:
        """Forget the last ``count`` tokens, and bring back what was dropped because of them.

        Raises:
            CacheError: fewer tokens were seen, or slots dropped since then are already freed.
        """
        self.abort()
        check_rollback(count, self.seen)
        to = self.seen - count
        if count and to < (horizon := self._last_final_drop()):
            raise CacheError(
                f"cannot roll back to token {to}: what was dropped up to token {horizon} is freed; "
                "call activate_past_recording() before the tokens that may be taken back"
            )
        if not self._remembered.knows(to):
            raise CacheError(
                f"cannot roll back to token {to}: it lies inside a block, and what the "
                "token policy remembers is known at its ends only; feed the tokens one by one"
            )
        self.settle_all()
        for slots in self._distinct():
            slots.rollback(to, self.seen)
        self._extent.seen = to
        self._final = min(self._final, to)
        self._remembered.restore(to)

    def _last_final_drop(self) -> int:
        """Return the number of tokens seen at the last drop that cannot be taken back."""
        final = [slots.last_drop(self._final) for slots in self._distinct() if slots.evicting]
        return max([self._horizon, *torch.stack(final).tolist()]) if final else self._horizon

    def accept(self) -> None:
        """Make final what was dropped so far: free it, whether the cache `keeps_dropped` or not."""
        self._final = self.seen
        self._remembered.forget_earlier()
        self._free()

    @torch.inference_mode(False)
    def reorder(self, rows: Tensor) -> None:
        """Make row i a copy of row ``rows[i]`` everywhere; ``rows`` may be shorter or longer than the batch."""
        check_rows(rows, self.batch)
        self.settle_all()
        if self._extent.batch:
            for slots in self._distinct():
                slots.reorder(rows.to(slots.born.device))
            self._extent.batch = rows.shape[0]
        for log in (self.feedback, self.scores):
            if log is not None:
                log.reorder(rows)
        for layer in self.layers:
            layer.reorder(rows)
        self._remembered.reorder(rows)

    def next_positions(self) -> Tensor:
        """Return the position after the last token of each row, [B, 1]. The newest token is never dropped."""
        return self.layers[0].slots.next_positions()

    def layer_nbytes(self) -> list[int]:
        """Return the bytes that each layer has allocated: keys, values, what is remembered, and states of its debts."""
        found = [layer.nbytes() for layer in self.layers]
        for layer_idx in self.debts.layers():
            found[layer_idx] += self.debts.nbytes(layer_idx)
        return found

    def nbytes(self) -> int:
        """Return the bytes that all layers have allocated, see `layer_nbytes`."""
        return sum(self.layer_nbytes())

    def held_by_token(self) -> Tensor:
        """Return how many slots each layer holds after each new token, if none drops any, [L, B, T]."""
        counts = {id(slots): slots.held_by_token(self._pending) for slots in self._distinct()}
        if len(counts) == 1:
            return next(iter(counts.values())).expand(len(self.layers), -1, -1)
        return torch.stack([counts[id(layer.slots)] for layer in self.layers])

    def kept(self) -> Tensor:
        """Return the number of valid slots of each layer and row, [L, B], on the host."""
        counts = {id(slots): slots.held() for slots in self._distinct()}
        return torch.stack([counts[id(slots)].cpu() for slots in self.slots]) if counts else torch.zeros(0, 0)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: nothing is owed, and no model hangs on it."""
        self.settle_all()
        return {**self.__dict__, "settle_with": None}

    def __copy__(self) -> AdaptiveCache:
        """Return a deep copy: a layer belongs to one cache."""
        return copy.deepcopy(self)

    def reset(self) -> None:
        """Forget everything and free the storage."""
        extent = self._extent
        extent.batch = extent.capacity = extent.seen = 0
        self._pending = self._horizon = self._final = 0
        self._sets, self.feedback, self.scores = [], None, None
        self.debts.clear()
        self._remembered.clear()
        nothing = Slots.nothing()
        for layer in self.layers:
            layer.slots = nothing
            layer.reset()
