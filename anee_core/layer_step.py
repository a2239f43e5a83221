"""Running one layer: the calls that people extend, and the seam behind which faster ones can stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from anee_core.adapter import LayerCall, ModelAdapter
from anee_core.cache import AdaptiveCache
from anee_core.interfaces import LinearGate, LinearInteraction, Shortcut
from anee_core.layer_store import CacheWriter
from anee_core.layout import Parts

Places = tuple[Tensor, Tensor]
"""Rows [R, 1] and columns [R, C] of some tokens of a block, which broadcast together."""


class TokenState(IntEnum):
    """What becomes of a token at a layer."""

    PADDING = 0
    SKIPPED = 1
    RUNS = 2
    DEFERRED = 3
    """It skips the layer, and somebody else sees to its keys and values."""


@dataclass(frozen=True)
class Limit:
    """The share ``most`` of a dense token's layer FLOPs that no token may exceed.

    ``run_shares`` and ``skip_shares`` [L, B, T] are what each layer takes of them; ``wanted`` [B, T] is what it takes
    to skip all layers but those that always run.
    """

    run_shares: Tensor
    skip_shares: Tensor
    wanted: Tensor
    most: float


@dataclass(frozen=True)
class GateCall:
    """A linear gate, and what it needs to know of the new tokens.

    ``shares`` [B, T, L] says which share of tokens is to skip each layer; ``scores`` [B, S, L] holds those of the
    ``seen`` earlier tokens, and has room for the step to write the new ones behind them. Some layers run ``always``
    [L]; if there is a ``limit``, no token exceeds it.
    """

    gate: LinearGate
    shares: Tensor
    scores: Tensor
    seen: int
    always: Tensor
    limit: Limit | None


@dataclass(frozen=True)
class DropCall:
    """A linear interaction that decides what each row's new token keeps of the cache.

    The step writes into ``held`` [L, B] int32 how many slots each layer holds after it.
    """

    interaction: LinearInteraction
    held: Tensor


@dataclass(frozen=True)
class Stack:
    """A forward through all layers, for a step that can take them at once.

    Every layer receives ``call``, and its own of the ``masks`` [B, 1, T, S], or None. ``states`` [L, B, T] uint8 on the
    host holds a `TokenState` for each token at each layer; if there is a ``gate``, the step writes what that decides of
    all that are no padding.
    ``dropping`` says what is dropped, if anything; there are no masks then. ``shortcut`` is what skipped tokens get.
    ``inputs`` [L, B, T, D], if given, is for the step to write what each layer receives.
    """

    call: LayerCall
    masks: Sequence[Tensor | None]
    states: Tensor
    gate: GateCall | None
    dropping: DropCall | None
    shortcut: Shortcut | None
    inputs: Tensor | None = None


class LayerStep(Protocol):
    """Runs decoder layers, writes the keys and values of tokens that skip them, and applies the head.

    An implementation may fuse, compile or capture; `ReferenceStep` is what it must agree with.
    """

    @property
    def slow_because(self) -> str | None:
        """Why layers run by their own modules; None if they do not."""
        ...

    @property
    def takes_all(self) -> bool:
        """Whether the block that was begun may be given to `all_layers`."""
        ...

    def begin(self, hidden_states: Tensor, cache: AdaptiveCache) -> None:
        """Look at a block [B, T, D] before its layers run."""
        ...

    def all_layers(self, hidden_states: Tensor, stack: Stack, cache: AdaptiveCache) -> Tensor | None:
        """Take a block [B, T, D] through all layers; None if they have to be taken one by one."""
        ...

    def run(
        self,
        layer_idx: int,
        hidden_states: Tensor,
        call: LayerCall,
        cache: AdaptiveCache,
        places: Places | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Run a layer for a block [B, T, D], or for its tokens at ``places`` [R, C], and return their new states.

        Their keys and values go into the cache. ``mask`` is the block's additive mask [B, 1, T, S], or None if each
        token sees every slot up to its own.
        """
        ...

    def propagate(
        self, layer_idx: int, hidden_states: Tensor, call: LayerCall, cache: AdaptiveCache, places: Places | None
    ) -> None:
        """Write the keys and values of a block [B, T, D], or of its tokens at ``places``, which skip the layer."""
        ...

    def settle(
        self, layer_idx: int, hidden_states: Tensor, call: LayerCall, cache: AdaptiveCache, slots: Tensor
    ) -> None:
        """Write the keys and values of tokens [B, P, D] that skipped the layer before, into slots [P]."""
        ...

    def norm(self, hidden_states: Tensor) -> Tensor:
        """Apply the final norm to what the layers gave, [B, T, D]."""
        ...

    def head(self, hidden_states: Tensor) -> Any:
        """Return what to apply to normed hidden states [B, T, D] as the model's head."""
        ...


class ReferenceStep:
    """Calls the model's own modules, wherever they are and whatever wraps them."""

    def __init__(self, adapter: ModelAdapter, parts: Parts) -> None:
        self._adapter, self._parts = adapter, parts

    @property
    def slow_because(self) -> str | None:
        """That this is what was asked for."""
        return "fast=False"

    @property
    def takes_all(self) -> bool:
        """No."""
        return False

    def begin(self, hidden_states: Tensor, cache: AdaptiveCache) -> None:
        """Do nothing."""

    def all_layers(self, hidden_states: Tensor, stack: Stack, cache: AdaptiveCache) -> Tensor | None:
        """Leave it to `run` and `propagate`."""
        return None

    def run(
        self,
        layer_idx: int,
        hidden_states: Tensor,
        call: LayerCall,
        cache: AdaptiveCache,
        places: Places | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Run the decoder layer itself."""
        writer = CacheWriter(cache, layer_idx)
        if places is not None:
            rows, columns = places
            hidden_states, call = hidden_states[rows, columns], call.select(rows, columns)
            writer = CacheWriter(cache, layer_idx, rows, columns)
            mask = None if mask is None else mask[rows, 0, columns].unsqueeze(1)
        return self._adapter.run(self._parts, layer_idx, hidden_states, call.with_mask(mask), writer)

    def propagate(
        self, layer_idx: int, hidden_states: Tensor, call: LayerCall, cache: AdaptiveCache, places: Places | None
    ) -> None:
        """Project through the layer's own norm and projections."""
        if places is not None:
            hidden_states, call = hidden_states[places], call.select(*places)
        keys, values = self._adapter.project_kv(self._parts, layer_idx, hidden_states, call)
        cache.write(layer_idx, keys, values, *(places or ()))

    def settle(
        self, layer_idx: int, hidden_states: Tensor, call: LayerCall, cache: AdaptiveCache, slots: Tensor
    ) -> None:
        """Project all of them at once."""
        keys, values = self._adapter.project_kv(self._parts, layer_idx, hidden_states, call)
        cache.write_slots(layer_idx, keys, values, slots)

    def norm(self, hidden_states: Tensor) -> Tensor:
        """Apply the norm itself."""
        normed: Tensor = self._parts.final_norm(hidden_states)
        return normed

    def head(self, hidden_states: Tensor) -> Any:
        """Return the head itself."""
        return self._parts.head


class StepAround:
    """Leaves everything to another step: what wraps one overrides what it changes."""

    def __init__(self, step: LayerStep) -> None:
        self._step = step

    @property
    def inner(self) -> LayerStep:
        """The step."""
        return self._step

    @property
    def slow_because(self) -> str | None:
        """What the step says."""
        return self._step.slow_because

    @property
    def takes_all(self) -> bool:
        """What the step says."""
        return self._step.takes_all

    def begin(self, *args: Any, **kwargs: Any) -> None:
        """Let the step look at a block."""
        self._step.begin(*args, **kwargs)

    def all_layers(self, hidden_states: Tensor, stack: Stack, cache: AdaptiveCache) -> Tensor | None:
        """Let the step take all layers."""
        return self._step.all_layers(hidden_states, stack, cache)

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """Let the step run a layer."""
        return self._step.run(*args, **kwargs)

    def propagate(self, *args: Any, **kwargs: Any) -> None:
        """Let the step write keys and values."""
        self._step.propagate(*args, **kwargs)

    def settle(self, *args: Any, **kwargs: Any) -> None:
        """Let the step write keys and values of tokens that skipped the layer before."""
        self._step.settle(*args, **kwargs)

    def norm(self, hidden_states: Tensor) -> Tensor:
        """Apply the step's norm."""
        return self._step.norm(hidden_states)

    def head(self, hidden_states: Tensor) -> Any:
        """Return the step's head."""
        return self._step.head(hidden_states)


def devices_of(parts: Parts) -> tuple[torch.device, ...]:
    """Return the device of each layer."""
    return tuple(next(layer.parameters()).device for layer in parts.layers)
