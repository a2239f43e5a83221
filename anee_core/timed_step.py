"""Where a token's time goes: a layer step that holds a watch to another."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from anee_core.cache import AdaptiveCache
from anee_core.layer_step import LayerStep, Stack, StepAround
from anee_core.native.step import NativeStep
from anee_core.native.structs import Seconds


class TimedStep(StepAround):
    """Does what another step does, and adds up the seconds that it takes for layers and head, and what is between the
    calls for layers: decisions, and the masks and accounts that follow from them.
    """

    def __init__(self, step: LayerStep) -> None:
        super().__init__(step)
        inner = step
        while isinstance(inner, StepAround):
            inner = inner.inner
        self._native = inner if isinstance(inner, NativeStep) else None
        self._left = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._taken = {"layers": 0.0, "head": 0.0, "between": 0.0}
        self.inside = Seconds()
        """What the library says of itself."""
        if self._native is not None:
            self._native.seconds = self.inside

    def close(self) -> dict[str, float | None]:
        """Take the watch away, and return the seconds that were taken: by layers, which may be in several parts; the
        part of it that is attention, None where the layers' own modules ran; decisions; the head.
        """
        if self._native is not None:
            self._native.seconds = None
        by_modules = self.slow_because is not None
        deciding: float = self.inside.decisions
        return {
            "layers": self._taken["layers"] - deciding,
            "attention": None if by_modules else self.inside.attention,
            "policy": self._taken["between"] + deciding,
            "head": self._taken["head"],
        }

    def begin(self, *args: Any, **kwargs: Any) -> None:
        """Look at a block; what follows is between."""
        super().begin(*args, **kwargs)
        self._left = time.perf_counter()

    def all_layers(self, hidden_states: Tensor, stack: Stack, cache: AdaptiveCache) -> Tensor | None:
        """Take all layers."""
        output: Tensor | None = self._layers(super().all_layers, hidden_states, stack, cache)
        return output

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a layer."""
        output: Tensor = self._layers(super().run, *args, **kwargs)
        return output

    def propagate(self, *args: Any, **kwargs: Any) -> None:
        """Write keys and values of tokens that skip a layer."""
        self._layers(super().propagate, *args, **kwargs)

    def head(self, hidden_states: Tensor) -> Any:
        """Return the head, with a watch held to it."""
        head = super().head(hidden_states)
        return lambda states: self._timed("head", head, states)

    def _layers(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._taken["between"] += time.perf_counter() - self._left
        try:
            return self._timed("layers", work, *args, **kwargs)
        finally:
            self._left = time.perf_counter()

    def _timed(self, part: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            self._taken[part] += time.perf_counter() - started
