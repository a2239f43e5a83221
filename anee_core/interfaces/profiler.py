"""Profilers: what measures the state of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """What a profiler may look at in front of one layer.

    ``hidden_states`` and ``previous`` are [B, T, D]: the layer's input and the input of the layer before (the same
    tensor in front of the first). ``feedback`` [B, T, 3] holds entropy and largest probability of the distribution
    that each token was drawn from, and the share of dense FLOPs that its sequence has spent before it.
    ``seen`` [B, T] counts the tokens before it, ``spent`` [B, T] what the token itself has spent.
    """

    hidden_states: Tensor
    previous: Tensor
    layer_idx: int
    num_layers: int
    spent: Tensor
    seen: Tensor
    budget: float
    feedback: Tensor | None = None


class Profiler(ABC):
    """Measures the state of tokens."""

    names: ClassVar[tuple[str, ...]]
    """Signals this profiler knows."""
    feedback: ClassVar[frozenset[str]] = frozenset()
    """Signals that depend on the model's own output for earlier tokens."""

    @abstractmethod
    def observe(self, observation: Observation, names: tuple[str, ...]) -> Tensor:
        """Return the named signals [B, T, F], in that order, on the device of the hidden states."""
