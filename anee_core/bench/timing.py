"""Watches that tell where time goes: held to generation, to layer steps and to memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.steps.calls import LayerInput, Stack
from anee_core.steps.layer_step import LayerStep, StepAround
from anee_core.steps.native.step import NativeStep
from anee_core.steps.native.structs import Seconds


class TimedStep(StepAround):
    """Do what another step does, and add up the seconds that it takes.

    They are told apart for layers, the head, and what lies between the calls for layers: decisions, and the masks and
    accounts that follow from them.
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
        """What the library says that attention and decisions take within it."""
        if self._native is not None:
            self._native.seconds = self.inside

    def close(self) -> dict[str, float | None]:
        """Take the watch away, and return the seconds that each part took.

        ``layers`` may have been taken in several pieces; ``attention`` is the part of it that is attention, None where
        the layers' own modules ran; ``policy`` is what decisions took.
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

    def begin(self, hidden_states: Tensor, cache: AdaptiveCache) -> None:
        """Let the step look at a block; what follows lies between the calls for layers."""
        super().begin(hidden_states, cache)
        self._left = time.perf_counter()

    def all_layers(self, hidden_states: Tensor, stack: Stack, cache: AdaptiveCache) -> Tensor | None:
        """Let the step take all layers, and time it."""
        output: Tensor | None = self._layers(super().all_layers, hidden_states, stack, cache)
        return output

    def run(self, given: LayerInput, mask: Tensor | None) -> Tensor:
        """Let the step run a layer, and time it."""
        output: Tensor = self._layers(super().run, given, mask)
        return output

    def propagate(self, given: LayerInput) -> None:
        """Let the step write keys and values of tokens that skip a layer, and time it."""
        self._layers(super().propagate, given)

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


class Stopwatch:
    """A streamer that notes when tokens come: the prompt first, then one new token of each row at a time.

    Args:
        read: called when the prompt has been read, which is when the first new token comes.
    """

    def __init__(self, read: Callable[[], None] = lambda: None) -> None:
        self.marks: list[float] = []
        self._read = read

    def put(self, tokens: Tensor) -> None:
        """Note the time."""
        self.marks.append(time.perf_counter())
        if len(self.marks) == 2:
            self._read()

    def end(self) -> None:
        """Do nothing."""

    @property
    def prompt_seconds(self) -> float:
        """Seconds from the prompt to the first new token."""
        return self.marks[1] - self.marks[0]

    @property
    def token_seconds(self) -> float:
        """Median seconds between new tokens."""
        return statistics.median(b - a for a, b in zip(self.marks[1:], self.marks[2:], strict=False))


def read_bandwidth(device: str = "cpu", nbytes: int | None = None, repeats: int = 10) -> float:
    """Return how fast memory can be read, in GB/s.

    It is the best of some sums over a tensor of ``nbytes``, by default a large one.
    """
    nbytes = nbytes or 1 << (28 if device == "cpu" else 31)
    data = torch.ones(nbytes // 4, device=device)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        float(data.sum())
        best = min(best, time.perf_counter() - started)
    return nbytes / best / 1e9
