"""The key/value cache: one object that owns lengths, positions, validity, dropping and rollback."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from anee_core.adapter.layer_call import LayerCall
from anee_core.cache.layer_store import LayerStore
from anee_core.cache.slots import Slots
from anee_core.cache.token_logs import FeedbackLog, ScoreLog
from anee_core.errors import CacheError

if TYPE_CHECKING:
    from anee_core.accounting.trace import Trace


_FIRST_CAPACITY = 64
_LOAD_FACTOR = 0.9
"""Compact a layer whose fullest row holds less than this share of the used slots."""
_SLACK = 16
"""Free slots beyond those that fill up until the next compaction."""


class AdaptiveCache(Cache):  # type: ignore[misc]  # transformers ships without types
    """Keys and values of all layers, with per-slot positions and validity.

    ``seen`` is the logical length: tokens processed, what `get_seq_length` reports. The slots held are another
    number, per layer and row. A forward is `begin` (hand out slots), `write` for each layer, `commit`.

    Whatever is allocated is allocated outside inference mode, so that a prompt read in it can be continued outside.
    """

    def __init__(self, num_layers: int, capacity: int | None = None) -> None:
        super().__init__(layers=[LayerStore(self, i) for i in range(num_layers)])
        self.seen = 0
        self.batch = 0
        self.capacity = capacity or 0
        self.slots: list[Slots] = []
        self.feedback: FeedbackLog | None = None
        """For policies that feed back: what is known of each row's own output."""
        self.scores: ScoreLog | None = None
        """For policies that compare tokens: what each was given at each layer."""
        self.trace: Trace | None = None
        """Where the coming forwards are recorded, if someone gathers several."""
        self.read_densely = False
        """Whether the next forward runs every layer, whatever the policy: the prompt of a generation."""
        self.recording = False
        self.pay: Callable[[int, Tensor, LayerCall, AdaptiveCache, Tensor], None] | None = None
        """Writes keys and values that are owed: layer, hidden states [B, P, D], call, cache, slots [P]."""
        self._owed: dict[int, list[tuple[int, Tensor, LayerCall]]] = {}
        self._sets: list[Slots] = []
        """Each of the slots once, if that is known."""
        self._starts: list[int] = []
        self._grown = False
        self._attached = False
        """Whether keys or values that were written carry a gradient."""
        self._pending = 0
        self._horizon = 0
        self._final = 0
        self._staged: dict[int, dict[str, Tensor]] = {}
        self._snapshots: dict[int, list[dict[str, Tensor]]] = {}

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` is exact (transformers asks)."""
        return True

    # One forward.

    @torch.inference_mode(False)
    def begin(self, position_ids: Tensor, real: Tensor | None) -> None:
        """Hand out slots for tokens [B, T] in every layer; ``real`` [B, T] is False for padding.

        Raises:
            CacheError: the batch size is not that of the cache.
        """
        batch, count = position_ids.shape
        if not self.slots:
            self.batch = batch
            self.capacity = max(self.capacity, count)
            shared = Slots(batch, position_ids.device, self.capacity)
            self.slots, self._sets = [shared] * len(self.layers), [shared]
        if batch != self.batch:
            raise CacheError(
                f"the cache holds {self.batch} rows and got {batch}: start a new cache, or reorder this one"
            )
        self.abort()
        for slots in self._distinct():
            needed = slots.used + count
            if needed > slots.capacity:
                # Doubling would undo what dropping saves: what is dropped will make room again.
                room = slots.capacity * 5 // 4 if slots.gaps else 2 * slots.capacity
                slots.grow(max(room, needed, _FIRST_CAPACITY))
                self._grown = True  # until the storage follows, which may fail
        if self._grown:
            self.capacity = max(s.capacity for s in self.slots)
            for layer, slots in zip(self.layers, self.slots, strict=True):
                layer.room(slots)
            self._grown = False
        # Last: if memory runs out above, no slot has been handed out.
        starts = {id(slots): slots.extend(position_ids, real, self.seen) for slots in self._distinct()}
        self._starts = [starts[id(s)] for s in self.slots]
        self._pending = count

    def storage(self, layer_idx: int, heads: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return one layer's storage of keys and values, [B, H, capacity, Dh], in the dtype of ``like``, for a step
        that writes into it.
        """
        store = self.layers[layer_idx]
        if store.keys is None:
            nothing = like.new_empty(1, heads, 0, width)
            store.lazy_initialization(nothing, nothing)
        keys, values = store.keys, store.values
        wanted = heads, width, like.dtype
        if (keys.shape[1], keys.shape[3], keys.dtype) != wanted or values.dtype != like.dtype:
            raise _misfit("keys and values", (*wanted[:2],), like.dtype)
        return store.keys, store.values

    def span(self, layer_idx: int) -> tuple[int, int]:
        """Return the slot of the current block's first token in one layer, and the number of slots handed out."""
        return self._starts[layer_idx], self.slots[layer_idx].used

    def write_slots(self, layer_idx: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Store keys and values [B, H, P, Dh] in slots [P]."""
        for target, new in zip(self._targets(layer_idx, keys, values), (keys, values), strict=True):
            target.index_copy_(2, slots.to(new.device), new)

    def owe(self, layer_idx: int, hidden_states: Tensor, call: LayerCall) -> int:
        """Note that the current tokens [B, 1, D] skipped a layer and have no keys and values there yet.

        Returns how many slots of a row are without, now.
        """
        owed = self._owed.setdefault(layer_idx, [])
        owed.append((self._starts[layer_idx], hidden_states, call))
        return len(owed)

    def settle(self, layer_idx: int) -> None:
        """Write the keys and values that are owed to a layer."""
        owed = self._owed.get(layer_idx)
        if not owed:
            return
        assert self.pay is not None
        starts, states, calls = zip(*owed, strict=True)
        with torch.no_grad():
            together = states[0] if len(owed) == 1 else torch.cat(states, dim=1)
            self.pay(layer_idx, together, LayerCall.joined(calls), self, torch.tensor(starts))
        del self._owed[layer_idx]

    def settle_all(self) -> None:
        """Write all keys and values that are owed."""
        for layer_idx in list(self._owed):
            self.settle(layer_idx)

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

    def _targets(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return where one layer's keys and values lie, [B, H, capacity, Dh], for some like these to be written."""
        store = self.layers[layer_idx]
        if store.keys is None:
            store.lazy_initialization(keys, values)
        # Either alone may carry a gradient: where only the values are trained, the first layer's keys do not.
        self._attached = self._attached or keys.requires_grad or values.requires_grad
        return store.keys, store.values

    def held(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return one layer's keys and values, [B, H, S, Dh]."""
        self.settle(layer_idx)
        held: tuple[Tensor, Tensor] = self.layers[layer_idx].held(self.slots[layer_idx].used)
        return held

    @torch.inference_mode(False)
    def remember(self, layer_idx: int, state: Mapping[str, Tensor]) -> None:
        """Store what a policy wants to know later of the current block's tokens, by name, [B, T, ...]."""
        store, start = self.layers[layer_idx], self._starts[layer_idx]
        for name, rows in state.items():
            if name not in store.state:
                capacity = self.slots[layer_idx].capacity
                store.state[name] = rows.new_zeros(rows.shape[0], capacity, *rows.shape[2:])
            if store.state[name].shape[2:] != rows.shape[2:] or store.state[name].dtype != rows.dtype:
                raise _misfit(f"'{name}'", rows.shape[2:], rows.dtype)
            store.state[name].narrow(1, start, rows.shape[1]).copy_(rows.detach())

    @torch.inference_mode(False)
    def dropping(self, name: str, width: int, like: Tensor) -> list[tuple[Slots, Tensor]]:
        """Return each layer's slots, and what is remembered of them under a name, [B, capacity, width] in the dtype of
        ``like``, for a step that writes both: what it drops of the current block's forward, and of its tokens.
        """
        found = []
        for layer_idx, store in enumerate(self.layers):
            slots = self._own_slots(layer_idx)
            slots.full, slots.evicting, slots.gaps = False, True, True
            if name not in store.state:
                store.state[name] = like.new_zeros(self.batch, slots.capacity, width)
            if store.state[name].shape[2:] != (width,) or store.state[name].dtype != like.dtype:
                raise _misfit(f"'{name}'", (width,), like.dtype)
            found.append((slots, store.state[name]))
        return found

    def state(self, layer_idx: int) -> dict[str, Tensor]:
        """Return what is remembered of one layer's slots, [B, S, ...]."""
        used = self.slots[layer_idx].used
        return {name: known.narrow(1, 0, used) for name, known in self.layers[layer_idx].state.items()}

    @torch.inference_mode(False)
    def evict(self, layer_idx: int | None, alive: Tensor, state: Mapping[str, Tensor] | None = None) -> None:
        """Drop slots of one layer, or if None is given of all, which are `alike` then: ``alive`` [B, T, S] says what is
        held after each of the T newest tokens.

        ``state`` is what is remembered of one layer from now on, [B, S, ...]. Memory is freed by `commit`.
        """
        slots = self.slots[0] if layer_idx is None else self._own_slots(layer_idx)
        if not self._pending:
            # Outside a forward: not final before the next one, unlike what fell at the end of the last.
            self._horizon, self._final = self._last_final_drop(), self.seen - 1
        slots.evict(alive, self.seen + self._pending)
        if state:
            assert layer_idx is not None
            self._staged[layer_idx] = {name: known.detach() for name, known in state.items()}

    @property
    def alike(self) -> bool:
        """Whether all layers hold the same tokens in the same slots."""
        return len(self._distinct()) <= 1

    def _own_slots(self, layer_idx: int) -> Slots:
        """Return a layer's slots, which no other layer shares from now on."""
        slots = self.slots[layer_idx]
        if any(other is slots for i, other in enumerate(self.slots) if i != layer_idx):
            slots = self.slots[layer_idx] = slots.clone()
            self._sets = []
        return slots

    @torch.inference_mode(False)
    def commit(self) -> None:
        """End the forward: its tokens count as seen; dropped slots are freed unless `recording`."""
        if self.recording and self._staged:
            self._snapshots[self.seen] = [dict(layer.state) for layer in self.layers]
            for layer_idx in self._staged:
                store = self.layers[layer_idx]
                store.state = {name: known.clone() for name, known in store.state.items()}
        for layer_idx, state in self._staged.items():
            for name, known in state.items():
                self.layers[layer_idx].state[name].narrow(1, 0, known.shape[1]).copy_(known)
        if not self.recording and (self._staged or self._snapshots):
            # What was remembered before is overwritten.
            self._horizon = self.seen + (self._pending if self._staged else 0)
            self._snapshots = {}
        self.seen += self._pending
        self._staged = {}
        self._pending = 0
        self._detach()
        if not self.recording:
            self._final = self.seen
            self._free()

    def abort(self) -> None:
        """Take back the slots of a forward that did not reach `commit`."""
        if self._pending:
            for layer_idx, owed in self._owed.items():
                owed[:] = [debt for debt in owed if debt[0] < self._starts[layer_idx]]
            for slots in self._distinct():
                slots.rollback(self.seen, self.seen + self._pending)
            self._pending = 0
            self._staged = {}
            self._detach()

    def _detach(self) -> None:
        """Let go of the autograd graph of the forward that wrote last."""
        for layer in self.layers if self._attached else ():
            if layer.keys is not None:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
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
        """Move what is held to the front, in all layers that have these slots, whose fullest and emptiest row hold
        ``most`` and ``least``.
        """
        sharing = [i for i, other in enumerate(self.slots) if other is slots]
        for layer_idx in sharing:
            self.settle(layer_idx)
        try:
            source = slots.compact(max(most, 1), slots.check_at, full=most == least > 0)
            for layer_idx in sharing:
                self.layers[layer_idx].take(source, slots.capacity)
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
        to = self.seen - count
        if count < 0 or to < 0:
            raise CacheError(f"cannot roll back {count} tokens: {self.seen} were seen")
        if count and to < (horizon := self._last_final_drop()):
            raise CacheError(
                f"cannot roll back to token {to}: what was dropped up to token {horizon} is freed; "
                "call activate_past_recording() before the tokens that may be taken back"
            )
        if to not in self._snapshots and any(seen > to for seen in self._snapshots):
            raise CacheError(
                f"cannot roll back to token {to}: it lies inside a block, and what the "
                "token policy remembers is known at its ends only; feed the tokens one by one"
            )
        self.settle_all()
        for slots in self._distinct():
            slots.rollback(to, self.seen)
        self.seen = to
        self._restore_state(to)

    def _last_final_drop(self) -> int:
        """Return the number of tokens seen at the last drop that cannot be taken back."""
        final = [slots.last_drop(self._final) for slots in self._distinct() if slots.evicting]
        return max([self._horizon, *torch.stack(final).tolist()]) if final else self._horizon

    def _restore_state(self, to: int) -> None:
        for layer, slots, state in zip(self.layers, self.slots, self._snapshots.get(to, ()), strict=False):
            layer.state = state
            layer.room(slots)  # which may have grown since
        self._snapshots = {seen: states for seen, states in self._snapshots.items() if seen < to}

    @torch.inference_mode(False)
    def reorder(self, rows: Tensor) -> None:
        """Make row i a copy of row ``rows[i]`` everywhere; ``rows`` may be shorter or longer than the batch."""
        self.settle_all()
        if self.slots:
            for slots in self._distinct():
                slots.reorder(rows.to(slots.born.device))
            self.batch = rows.shape[0]
        if self.feedback is not None:
            self.feedback.reorder(rows)
        if self.scores is not None:
            self.scores.reorder(rows)
        for layer in self.layers:
            if layer.keys is not None:
                index = rows.to(layer.keys.device)
                layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)
                layer.state = _rows(layer.state, rows)
        for states in self._snapshots.values():
            states[:] = [_rows(state, rows) for state in states]

    def next_positions(self) -> Tensor:
        """Return the position after the last held token of each row, [B, 1]. The newest token is never dropped."""
        slots = self.slots[0]
        if not slots.used:
            return slots.position.new_zeros(self.batch, 1)
        return torch.where(slots.valid(), slots.positions(), -1).amax(1, keepdim=True) + 1

    def layer_nbytes(self) -> list[int]:
        """Return the bytes that each layer has allocated for keys, values and what its policy remembers of them, the
        hidden states of tokens whose keys and values it is owed included.
        """
        held = [layer.nbytes() for layer in self.layers]
        for layer_idx, owed in self._owed.items():
            held[layer_idx] += sum(states.nbytes for _, states, _ in owed)
        return held

    def nbytes(self) -> int:
        """Return the bytes allocated for keys, values and what a policy remembers of them."""
        return sum(self.layer_nbytes())

    def held_by_token(self) -> Tensor:
        """Return how many slots each layer holds after each token of the block that was begun, if none drops any,
        [L, B, T].
        """
        counts = {}
        for slots in self._distinct():
            batch, before = slots.position.shape[0], slots.used - self._pending
            if slots.full:
                counts[id(slots)] = torch.arange(before + 1, slots.used + 1, device=slots.position.device).expand(
                    batch, -1
                )
            else:
                valid = slots.valid()
                counts[id(slots)] = valid[:, :before].sum(1, keepdim=True) + valid[:, before:].cumsum(1)
        if len(counts) == 1:
            return next(iter(counts.values())).expand(len(self.slots), -1, -1)
        return torch.stack([counts[id(slots)] for slots in self.slots])

    def kept(self) -> Tensor:
        """Return the number of valid slots of each layer and row, [L, B], on the host."""
        counts = {id(s): s.held() for s in self._distinct()}
        return torch.stack([counts[id(s)].cpu() for s in self.slots]) if self.slots else torch.zeros(0, 0)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: nothing is owed, and no model hangs on it."""
        self.settle_all()
        return {**self.__dict__, "pay": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy, with layers of its own."""
        self.__dict__.update(state)
        for layer in self.layers:
            layer.belong_to(self)

    def __copy__(self) -> AdaptiveCache:
        """Return a deep copy: a layer belongs to one cache."""
        return copy.deepcopy(self)

    # The names by which transformers calls these.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen, dropped ones included."""
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens: transformers counts them as a negative number.

        A positive number is the length to keep, as in older versions. What is left has been accepted,
        so slots dropped because of it are freed.
        """
        self.rollback(max(self.seen - tokens_to_remove, 0) if tokens_to_remove > 0 else -tokens_to_remove)
        self._final, self._snapshots = self.seen, {}
        self._free()

    def activate_past_recording(self) -> None:
        """Keep dropped slots until the next `crop`, so that they can be brought back."""
        self.recording = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search's choice of rows."""
        self.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        self.reorder(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at ``indices``, numbers or one bool per row."""
        self.reorder(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def reset(self) -> None:
        """Forget everything and free the storage."""
        self.seen = self.batch = self.capacity = self._pending = self._horizon = self._final = 0
        self.slots, self._sets, self.feedback, self.scores = [], [], None, None
        self._staged, self._snapshots, self._owed = {}, {}, {}
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.state = {}
            layer.is_initialized = False


def _misfit(what: str, shape: Sequence[int], dtype: torch.dtype) -> CacheError:
    """Return the error for what of a new token does not fit that of the tokens held."""
    return CacheError(
        f"the cache holds other {what} than {list(shape)} in {dtype} of each token, which it gets now: start a new "
        "cache for another model, dtype or policy"
    )


def _rows(state: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: known.index_select(0, rows.to(known.device)) for name, known in state.items()}
