"""All layers as structs for ``cpp/stack.h``: filled once, and again where something has changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from ctypes import addressof, c_int32, c_void_p

import torch
from torch import Tensor

from anee_core.accounting.budget import SLACK
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.interfaces.formulas import LinearGate, LinearInteraction, LowRankMap
from anee_core.interfaces.shortcut import Shortcut
from anee_core.steps.calls import DropCall, GateCall
from anee_core.steps.native.layers import NativeLayer
from anee_core.steps.native.pointers import KINDS
from anee_core.steps.native.structs import LANES, Gate, Interaction, Layers, Matrix, Storage


class NativeStack:
    """All layers as one struct, for one thread.

    Args:
        layers: the model's layers as structs.
        threads: how many may work on a layer.
    """

    def __init__(self, layers: list[NativeLayer], threads: int) -> None:
        self.made_for = layers, threads
        """Layers and number of threads that it was made for."""
        count = len(layers)
        self._pointers = (c_void_p * count)(*(layer.address for layer in layers))
        self._threads = (c_int32 * count)(*(min(threads, layer.threads) for layer in layers))
        self._storage = (Storage * count)()
        self._known: list[Callable[[], Tensor | None]] = [lambda: None] * count
        """The keys that the storage points to, if they still exist; the values were allocated with them."""
        self._gate = Gate()
        self._gate_of: LinearGate | None = None
        self._interaction = Interaction()
        self._interaction_of: LinearInteraction | None = None
        self._query, self._key = (Matrix * count)(), (Matrix * count)()
        self._down, self._up = (Matrix * count)(), (Matrix * count)()
        self._shortcut: LowRankMap | None = None
        self.struct = Layers(
            layers=addressof(self._pointers),
            storage=addressof(self._storage),
            threads=addressof(self._threads),
            count=count,
        )
        self.address = addressof(self.struct)
        self.threads = max(self._threads)
        self.floats = max(layer.floats for layer in layers)
        """Numbers of scratch that a token needs, beside room for each thread's attention scores."""

    def set_storage(self, cache: AdaptiveCache, like: Tensor) -> None:
        """Point to a cache's keys and values, in the dtype of ``like``."""
        known, layers = self._known, self.made_for[0]
        for i, store in enumerate(cache.layers):
            if store.keys is not None and known[i]() is store.keys:
                continue
            keys, values = store.storage(layers[i].kv_heads, layers[i].head_dim, like)
            at = self._storage[i]
            at.keys, at.values = keys.data_ptr(), values.data_ptr()
            at.row_stride, at.head_stride = keys.stride()[:2]
            known[i] = weakref.ref(keys)

    def set_masks(self, masks: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
        """Point to each layer's mask, and return them all, for the caller to keep during the call."""
        made = {id(mask): mask.to(dtype).contiguous() for mask in masks if mask is not None}
        for at, mask in zip(self._storage, masks, strict=True):
            at.mask = None if mask is None else made[id(mask)].data_ptr()
        return list(made.values())

    def set_gate(self, call: GateCall | None) -> None:
        """Let a gate decide, or nobody."""
        if call is None:
            self.struct.gate = None
            return
        gate = self._gate
        if self._gate_of is not call.gate:
            self._gate_of = call.gate
            parts = (call.gate.weight, call.gate.bias, call.gate.mean, call.gate.spread)
            gate.weight, gate.bias, gate.mean, gate.spread = (part.data_ptr() for part in parts)
            gate.prior, gate.window = call.gate.prior, call.gate.window
        gate.shares, gate.scores = call.known.shares.data_ptr(), call.known.scores.data_ptr()
        gate.row_stride, gate.seen = call.known.scores.stride(0), call.known.seen
        gate.always, gate.wanted = call.always.data_ptr(), None
        if limit := call.limit:
            gate.run_share, gate.skip_share = limit.run_shares.data_ptr(), limit.skip_shares.data_ptr()
            gate.wanted, gate.limit = limit.wanted.data_ptr(), limit.most + SLACK
        self.struct.gate = addressof(gate)

    def set_interaction(self, call: DropCall | None, cache: AdaptiveCache, like: Tensor) -> bool:
        """Let an interaction drop tokens of a cache, or nobody; return whether that is possible.

        Hidden states are in the dtype of ``like``.
        """
        if call is None:
            self.struct.interaction = None
            return True
        known, struct = call.interaction, self._interaction
        rank, width = known.query.shape[1:]
        if not _plain((known.query, known.key), like.dtype) or not _plain((known.bias,), torch.float32):
            return False
        if self._interaction_of is not known:
            self._interaction_of = known
            for i, (query, key) in enumerate(zip(known.query, known.key, strict=True)):
                self._query[i], self._key[i] = _matrix(query), _matrix(key)
            struct.query, struct.key = addressof(self._query), addressof(self._key)
            struct.bias, struct.scale, struct.rank = known.bias.data_ptr(), rank**-0.5, rank
            self.floats = max(self.floats, width + 2 * rank + 3 * LANES)
        for i, (slots, remembered) in enumerate(cache.dropping(known.state, rank, like)):
            at = self._storage[i]
            at.interactions, at.interaction_stride = remembered.data_ptr(), remembered.stride(0)
            at.died, at.died_stride = slots.died.data_ptr(), slots.died.stride(0)
            at.start, at.used = cache.span(i)
        struct.held, struct.now = call.held.data_ptr(), cache.seen + 1
        self.struct.interaction = addressof(struct)
        return True

    def set_shortcut(self, shortcut: Shortcut | None, dtype: torch.dtype) -> bool:
        """Give skipped tokens a shortcut, or none; return whether that is possible."""
        if shortcut is None:
            self.struct.down = self.struct.up = None
            return True
        formula = shortcut.low_rank
        if formula is None:
            return False
        parts = (formula.down, formula.up, formula.bias)
        if not _plain(parts, dtype):
            return False
        if self._shortcut is not formula:
            self._shortcut = formula
            for i, (down, up, bias) in enumerate(zip(*parts, strict=True)):
                self._down[i], self._up[i] = _matrix(down), _matrix(up, bias)
            self.floats = max(self.floats, 2 * formula.down.shape[2] + formula.down.shape[1] + 3 * LANES)
        self.struct.down, self.struct.up = addressof(self._down), addressof(self._up)
        return True


def _plain(parts: Iterable[Tensor], dtype: torch.dtype) -> bool:
    """Whether tensors can be read by pointer, as numbers of a type."""
    return all(part.dtype == dtype and part.is_contiguous() and part.device.type == "cpu" for part in parts)


def _matrix(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    outputs, inputs = weight.shape
    return Matrix(
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        stride=inputs,
        outputs=outputs,
        inputs=inputs,
        group=outputs,
        kind=KINDS[weight.dtype],
    )
