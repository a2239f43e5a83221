"""What captured graphs work on: buffers that stay where they are while tokens come and go."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from anee_core.adapter.layer_call import LayerCall
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.steps.calls import GateCall
from anee_core.steps.graphs.capture import Capture, Graph
from anee_core.steps.graphs.gate import GateBuffers

S = TypeVar("S")
H = TypeVar("H")


class Graphs:
    """The graphs that work on one cache's storage, and the buffers between them.

    Args:
        like: hidden states [B, 1, D].
        capacity: slots that the storage has.
    """

    @torch.inference_mode(False)
    def __init__(self, like: Tensor, capacity: int) -> None:
        self.states = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        """[B, 1, D] hidden states that the graphs hand on."""
        self.slot = torch.zeros(1, dtype=torch.long, device=like.device)
        """[1] slot of the new token."""
        self.calls: Buffers[LayerCall, LayerCall] = Buffers(_like_call, _fill_call)
        self.masks: Buffers[Tensor | None, Tensor] = Buffers(self._new_mask, self._fill_mask)
        self._capacity, self._used = capacity, 0
        self._gate: GateBuffers | None = None
        self._captured: dict[Hashable, tuple[Graph, object]] = {}

    def begin(self, slot: int, used: int) -> None:
        """Begin a forward that writes into a slot, and sees some of those ``used``."""
        self.slot.fill_(slot)
        self._used = used
        self.calls.release()
        self.masks.release()

    def gate(self, call: GateCall) -> GateBuffers:
        """Return the buffers that hold what a gate is told."""
        if self._gate is None or not self._gate.serves(call):
            self._gate = GateBuffers(call, self.states)
        self._gate.fill(call)
        return self._gate

    def launch(self, key: Hashable, work: Callable[[], None], capture: Capture, keep: object = None) -> None:
        """Replay the graph of some work on the buffers; capture it before, if that was not done yet.

        ``keep`` lives as long as the graph. The work does not: it would keep the cache's storage alive, where another
        cache may come to lie, whose graph this then is.
        """
        if key not in self._captured:
            before = self.states.clone()
            try:
                with torch.cuda.device_of(before):  # type: ignore[no-untyped-call]
                    self._captured[key] = capture(work), keep
            finally:
                self.states.copy_(before)
        self._captured[key][0].replay()

    def _new_mask(self, mask: Tensor | None) -> Tensor:
        return self.states.new_empty(self.states.shape[0], 1, 1, self._capacity)

    def _fill_mask(self, held: Tensor, mask: Tensor | None) -> None:
        """Forbid the slots that nobody has used yet; ``mask`` [B, 1, 1, S] speaks of the others."""
        held.fill_(torch.finfo(held.dtype).min)
        seen = held[..., : self._used]
        if mask is None:
            seen.zero_()
        else:
            seen.copy_(mask)


class Buffers(Generic[S, H]):
    """Buffers for the different things of one kind that a forward hands to its layers.

    The first thing goes into the first buffer, and so on.
    """

    def __init__(self, make: Callable[[S], H], fill: Callable[[H, S], None]) -> None:
        self._make, self._fill = make, fill
        self._buffers: list[H] = []
        self._held: list[S] = []

    def release(self) -> None:
        """Make all buffers free, for another forward."""
        self._held = []

    def assign(self, thing: S) -> tuple[int, H]:
        """Return the number of the buffer that holds a thing, and the buffer."""
        for i, known in enumerate(self._held):
            if known is thing:
                return i, self._buffers[i]
        i = len(self._held)
        self._held.append(thing)
        if i == len(self._buffers):
            with torch.inference_mode(False):
                self._buffers.append(self._make(thing))
        self._fill(self._buffers[i], thing)
        return i, self._buffers[i]


def _like_call(call: LayerCall) -> LayerCall:
    angles = call.position_embeddings
    return LayerCall(
        position_ids=torch.zeros_like(call.position_ids),
        position_embeddings=None if angles is None else (torch.zeros_like(angles[0]), torch.zeros_like(angles[1])),
    )


def _fill_call(held: LayerCall, call: LayerCall) -> None:
    held.position_ids.copy_(call.position_ids)
    if held.position_embeddings is not None and call.position_embeddings is not None:
        for buffer, angles in zip(held.position_embeddings, call.position_embeddings, strict=True):
            buffer.copy_(angles)


class SlotWriter:
    """What a captured layer gets as its cache: a place for one token's keys and values, and all slots to look at."""

    def __init__(self, cache: AdaptiveCache, layer_idx: int, slot: Tensor) -> None:
        self._keys, self._values, self._slot = cache.layers[layer_idx].keys, cache.layers[layer_idx].values, slot

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store [B, H, 1, Dh] and return what there is room for, [B, H, capacity, Dh]."""
        self._keys.index_copy_(2, self._slot, keys)
        self._values.index_copy_(2, self._slot, values)
        return self._keys, self._values
