"""Where a token's time goes: a layer step that holds a watch to another."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from anee_core.adapter import LayerCall
from anee_core.cache import AdaptiveCache
from anee_core.layer_step import LayerStep, Places


class TimedStep:
    """Does what another step does, and adds up the ``seconds`` that it takes for "layers" and "head"."""

    def __init__(self, step: LayerStep) -> None:
        self._step = step
        self.seconds = {"layers": 0.0, "head": 0.0}

    @property
    def slow_because(self) -> str | None:
        """What the step says."""
        return self._step.slow_because

    def begin(self, hidden_states: Tensor, cache: AdaptiveCache) -> None:
        """Let the step look at a block."""
        self._step.begin(hidden_states, cache)

    def run(
        self,
        layer_idx: int,
        hidden_states: Tensor,
        call: LayerCall,
        cache: AdaptiveCache,
        places: Places | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Run a layer."""
        run = self._step.run
        output: Tensor = self._timed("layers", lambda: run(layer_idx, hidden_states, call, cache, places, mask))
        return output

    def propagate(
        self, layer_idx: int, hidden_states: Tensor, call: LayerCall, cache: AdaptiveCache, places: Places | None
    ) -> None:
        """Write keys and values of tokens that skip a layer."""
        propagate = self._step.propagate
        self._timed("layers", lambda: propagate(layer_idx, hidden_states, call, cache, places))

    def settle(
        self, layer_idx: int, hidden_states: Tensor, call: LayerCall, cache: AdaptiveCache, slots: Tensor
    ) -> None:
        """Write keys and values of tokens that skipped a layer before."""
        self._timed("layers", lambda: self._step.settle(layer_idx, hidden_states, call, cache, slots))

    def head(self, hidden_states: Tensor) -> Any:
        """Return the head, with a watch held to it."""
        head = self._step.head(hidden_states)
        return lambda states: self._timed("head", lambda: head(states))

    def _timed(self, part: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[part] += time.perf_counter() - started
