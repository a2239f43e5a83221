"""The seam behind which faster ways to run a layer can stand."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.steps.calls import LayerInput, Stack


class LayerStep(Protocol):
    """What runs decoder layers, writes the keys and values of tokens that skip them, and applies the head.

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

    def run(self, given: LayerInput, mask: Tensor | None) -> Tensor:
        """Run a layer for some tokens, [R, C] of a block of [B, T], and return their new states [R, C, D].

        Their keys and values go into the cache. ``mask`` is the block's additive mask [B, 1, T, S], or None if each
        token sees every slot up to its own.
        """
        ...

    def propagate(self, given: LayerInput) -> None:
        """Write the keys and values of some tokens, which skip the layer."""
        ...

    def settle(self, given: LayerInput, slots: Tensor) -> None:
        """Write the keys and values of tokens [B, P, D] that skipped the layer before, into slots [P]."""
        ...

    def norm(self, hidden_states: Tensor) -> Tensor:
        """Apply the final norm to what the layers gave, [B, T, D]."""
        ...

    def head(self, hidden_states: Tensor) -> Any:
        """Return what to apply to normed hidden states [B, T, D] as the model's head."""
        ...


class StepAround:
    """A step that leaves everything to another one; what is derived from it overrides what it changes."""

    def __init__(self, step: LayerStep) -> None:
        self._step = step

    @property
    def inner(self) -> LayerStep:
        """The step that everything is left to."""
        return self._step

    @property
    def slow_because(self) -> str | None:
        """Why the inner step leaves layers to their own modules; None if it does not."""
        return self._step.slow_because

    @property
    def takes_all(self) -> bool:
        """Whether the step takes all layers of the block that was begun."""
        return self._step.takes_all

    def begin(self, hidden_states: Tensor, cache: AdaptiveCache) -> None:
        """Let the step look at a block."""
        self._step.begin(hidden_states, cache)

    def all_layers(self, hidden_states: Tensor, stack: Stack, cache: AdaptiveCache) -> Tensor | None:
        """Let the step take all layers."""
        return self._step.all_layers(hidden_states, stack, cache)

    def run(self, given: LayerInput, mask: Tensor | None) -> Tensor:
        """Let the step run a layer."""
        return self._step.run(given, mask)

    def propagate(self, given: LayerInput) -> None:
        """Let the step write keys and values."""
        self._step.propagate(given)

    def settle(self, given: LayerInput, slots: Tensor) -> None:
        """Let the step write keys and values of tokens that skipped the layer before."""
        self._step.settle(given, slots)

    def norm(self, hidden_states: Tensor) -> Tensor:
        """Apply the step's norm."""
        return self._step.norm(hidden_states)

    def head(self, hidden_states: Tensor) -> Any:
        """Return the step's head."""
        return self._step.head(hidden_states)
