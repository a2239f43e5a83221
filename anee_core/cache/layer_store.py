"""One layer's keys and values, and what writes into them: where they lie, not which tokens they are of."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from anee_core.cache.slots import Slots
from anee_core.errors import CacheError

if TYPE_CHECKING:
    from anee_core.cache.adaptive_cache import AdaptiveCache


class LayerStore(CacheLayerMixin):  # type: ignore[misc]  # transformers ships without types
    """Preallocated keys and values [B, H, capacity, Dh] of one layer, in the dtype they arrive in.

    ``state`` holds what a token policy remembers of each slot, by name, [B, capacity, ...].
    """

    is_compileable = False

    def __init__(self, cache: AdaptiveCache, layer_idx: int) -> None:
        super().__init__()
        self.belong_to(cache)
        self._layer_idx = layer_idx
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.state: dict[str, Tensor] = {}

    def belong_to(self, cache: AdaptiveCache) -> None:
        """Be a layer of a cache. It is not kept alive by that: gigabytes would wait for a garbage collection."""
        self._of = weakref.ref(cache)

    @property
    def _cache(self) -> AdaptiveCache:
        cache = self._of()
        assert cache is not None
        return cache

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs; its cache tells it where it belongs."""
        return {name: value for name, value in self.__dict__.items() if name != "_of"}

    @torch.inference_mode(False)
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate storage shaped like the first keys [B, H, T, Dh] and values."""
        self.keys = self._allocate(key_states, self._cache.capacity)
        self.values = self._allocate(value_states, self._cache.capacity)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def _allocate(self, like: Tensor, capacity: int) -> Tensor:
        _, heads, _, width = like.shape
        # Zeros: a masked slot that was never written must not put a NaN into attention.
        return like.new_zeros(self._cache.batch, heads, capacity, width)

    def room(self, slots: Slots) -> None:
        """Grow the storage to the capacity of ``slots``."""
        for name in ("keys", "values"):
            old = cast("Tensor | None", getattr(self, name))
            if old is not None and old.shape[2] < slots.capacity:
                new = self._allocate(old, slots.capacity)
                new[:, :, : old.shape[2]] = old
                setattr(self, name, new)
        for name, known in self.state.items():
            if known.shape[1] < slots.capacity:
                extra = known.new_zeros(known.shape[0], slots.capacity - known.shape[1], *known.shape[2:])
                self.state[name] = torch.cat((known, extra), dim=1)

    def nbytes(self) -> int:
        """Return the bytes allocated for keys, values and what a policy remembers of them."""
        # Each is an allocation of its own, never a part of another. Asked for each layer after every token.
        found = 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes
        for known in self.state.values():
            found += known.nbytes
        return found

    def held(self, used: int) -> tuple[Tensor, Tensor]:
        """Return views of the used slots' keys and values, [B, H, used, Dh]."""
        return cast(Tensor, self.keys).narrow(2, 0, used), cast(Tensor, self.values).narrow(2, 0, used)

    def take(self, source: Tensor, capacity: int) -> None:
        """Keep the slots ``source`` [B, S] of each row, in that order, in storage of ``capacity`` slots."""
        if self.keys is None or self.values is None:
            return
        for name in ("keys", "values"):
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

    # What transformers asks of a cache layer.

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: slots are handed out by the cache, see `AdaptiveCache.begin`."""
        raise CacheError("this cache is driven by ANEE's engine: pass it to an AdaptiveModel, not to a plain model")

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self._cache.seen

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: the name of `get_max_length` in older versions of transformers."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (slots after ``query_length`` more tokens, index of the first): exact while nothing was dropped."""
        used = self._cache.slots[self._layer_idx].used if self._cache.slots else 0
        return used + query_length, self._cache.seen - used
