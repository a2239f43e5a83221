"""One layer's keys and values: where they lie, not which tokens they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from anee_core.cache.slots import Slots
from anee_core.errors import CacheError


@dataclass
class Extent:
    """How far a cache reaches. One object, shared by the cache and its layers."""

    batch: int = 0
    """Number of rows; 0 before the first forward."""
    capacity: int = 0
    """Slots that a layer which holds nothing yet is to have room for."""
    seen: int = 0
    """Number of tokens read, dropped ones included."""


class LayerStore(CacheLayerMixin):  # type: ignore[misc]  # transformers ships without types
    """Preallocated keys and values [B, H, capacity, Dh] of one layer, in the dtype they arrive in.

    ``slots`` says which tokens they are of; layers that hold the same tokens share one. ``state`` holds what a token
    policy remembers of each slot, by name, [B, capacity, ...].
    """

    is_compileable = False

    def __init__(self, extent: Extent, slots: Slots) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        super().__init__()
        self._extent, self.slots = extent, slots
        self.state: dict[str, Tensor] = {}

    @property
    def keys(self) -> Tensor | None:
        """Where keys lie, [B, H, capacity, Dh]; None before the first."""
        return self._keys

    @keys.setter
    def keys(self, given: Tensor | None) -> None:
        self._refuse(given)

    @property
    def values(self) -> Tensor | None:
        """Where values lie, [B, H, capacity, Dh]; None before the first."""
        return self._values

    @values.setter
    def values(self, given: Tensor | None) -> None:
        self._refuse(given)

    def _refuse(self, given: Tensor | None) -> None:
        """Raise `CacheError` where keys or values are replaced by hand: the slots would not be theirs any more."""
        if given is not None:
            raise CacheError(
                "a layer's keys and values cannot be replaced one layer at a time: to take back tokens of all layers, "
                "call cache.crop(length) or cache.rollback(count); to drop tokens, use a token policy"
            )

    @torch.inference_mode(False)
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate storage shaped like the first keys [B, H, T, Dh] and values."""
        self._keys = self._allocate(key_states, self._extent.capacity)
        self._values = self._allocate(value_states, self._extent.capacity)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def _allocate(self, like: Tensor, capacity: int) -> Tensor:
        _, heads, _, width = like.shape
        # Zeros: a masked slot that was never written must not put a NaN into attention.
        return like.new_zeros(self._extent.batch, heads, capacity, width)

    def storage(self, heads: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return where keys and values of heads like these lie, [B, H, capacity, Dh], in the dtype of ``like``.

        Raises:
            CacheError: tokens before had other heads or another dtype.
        """
        if self.keys is None or self.values is None:
            nothing = like.new_empty(1, heads, 0, width)
            self.lazy_initialization(nothing, nothing)
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        if (keys.shape[1], keys.shape[3], keys.dtype, values.dtype) != (heads, width, like.dtype, like.dtype):
            raise misfit("keys and values", (heads, width), like.dtype)
        return keys, values

    def grow(self) -> None:
        """Grow the storage to the capacity of the slots."""
        capacity = self.slots.capacity
        for name in ("_keys", "_values"):
            old = cast("Tensor | None", getattr(self, name))
            if old is not None and old.shape[2] < capacity:
                new = self._allocate(old, capacity)
                new[:, :, : old.shape[2]] = old
                setattr(self, name, new)
        for name, known in self.state.items():
            if known.shape[1] < capacity:
                extra = known.new_zeros(known.shape[0], capacity - known.shape[1], *known.shape[2:])
                self.state[name] = torch.cat((known, extra), dim=1)

    def nbytes(self) -> int:
        """Return the bytes allocated for keys, values and what a policy remembers of them."""
        # Each is an allocation of its own, never a part of another. Asked for each layer after every token.
        found = 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes
        for known in self.state.values():
            found += known.nbytes
        return found

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Return views of the used slots' keys and values, [B, H, used, Dh]."""
        used = self.slots.used
        return cast(Tensor, self.keys).narrow(2, 0, used), cast(Tensor, self.values).narrow(2, 0, used)

    def compact(self, source: Tensor) -> None:
        """Keep the slots ``source`` [B, S] of each row, in that order, in storage of the slots' capacity."""
        if self.keys is None or self.values is None:
            return
        capacity = self.slots.capacity
        for name in ("_keys", "_values"):
            old = cast(Tensor, getattr(self, name))
            index = source.to(old.device)[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
            new = self._allocate(old, capacity)
            new[:, :, : source.shape[1]] = old.gather(2, index)
            setattr(self, name, new)
        for name, known in self.state.items():
            taken = known.new_zeros(known.shape[0], capacity, *known.shape[2:])
            rows = torch.arange(known.shape[0], device=known.device)[:, None]
            taken[:, : source.shape[1]] = known[rows, source.to(known.device)]
            self.state[name] = taken

    def reorder(self, rows: Tensor) -> None:
        """Make row i a copy of row ``rows[i]``; the slots are reordered by who owns them."""
        if self.keys is None or self.values is None:
            return
        index = rows.to(self.keys.device)
        self._keys, self._values = self.keys.index_select(0, index), self.values.index_select(0, index)
        self.state = rows_of(self.state, rows)

    def detach(self) -> None:
        """Let go of the autograd graph of what was written."""
        if self.keys is not None and self.values is not None:
            self._keys, self._values = self.keys.detach(), self.values.detach()

    # What transformers asks of a cache layer.

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: slots are handed out by the cache, see `AdaptiveCache.begin`."""
        raise CacheError("this cache is driven by ANEE's engine: pass it to an AdaptiveModel, not to a plain model")

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self._extent.seen

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1, as `get_max_length` does: older versions of transformers ask by this name."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (slots after ``query_length`` more tokens, index of the first): exact while nothing was dropped."""
        return self.slots.used + query_length, self._extent.seen - self.slots.used

    def reset(self) -> None:
        """Free the storage."""
        self._keys = self._values = None
        self.state = {}
        self.is_initialized = False


def rows_of(state: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Return the entries [B, ...] of some rows, by name."""
    return {name: known.index_select(0, rows.to(known.device)) for name, known in state.items()}


def misfit(what: str, shape: Sequence[int], dtype: torch.dtype) -> CacheError:
    """Return the error for something of a new token that does not fit what the cache holds of others."""
    return CacheError(
        f"the cache holds other {what} than {list(shape)} in {dtype} of each token, which it gets now: start a new "
        "cache for another model, dtype or policy"
    )
