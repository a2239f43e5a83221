"""Where a token's time goes: a layer step that holds a watch to another."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from anee_core.cache import AdaptiveCache
from anee_core.layer_step import LayerStep, Stack, StepAround


class TimedStep(StepAround):
    """Does what another step does, and adds up the ``seconds`` that it takes for "layers" and "head"."""

    def __init__(self, step: LayerStep) -> None:
        super().__init__(step)
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.seconds = {"layers": 0.0, "head": 0.0}

    def all_layers(self, hidden_states: Tensor, stack: Stack, cache: AdaptiveCache) -> Tensor | None:
        """Take all layers."""
        output: Tensor | None = self._timed("layers", super().all_layers, hidden_states, stack, cache)
        return output

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a layer."""
        output: Tensor = self._timed("layers", super().run, *args, **kwargs)
        return output

    def propagate(self, *args: Any, **kwargs: Any) -> None:
        """Write keys and values of tokens that skip a layer."""
        self._timed("layers", super().propagate, *args, **kwargs)

    def settle(self, *args: Any, **kwargs: Any) -> None:
        """Write keys and values of tokens that skipped a layer before."""
        self._timed("layers", super().settle, *args, **kwargs)

    def head(self, hidden_states: Tensor) -> Any:
        """Return the head, with a watch held to it."""
        head = super().head(hidden_states)
        return lambda states: self._timed("head", head, states)

    def _timed(self, part: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            self.seconds[part] += time.perf_counter() - started
