"""Profilers: what measures the state of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """What a profiler may look at in front of one layer."""

    hidden_states: Tensor
    """[B, T, D] input of the layer."""
    previous: Tensor
    """[B, T, D] input of the layer before; the same tensor in front of the first."""
    layer_idx: int
    """Index of the layer."""
    num_layers: int
    """Number of decoder layers."""
    spent: Tensor
    """[B, T] what each token has spent so far, as a share of a dense token's layer FLOPs."""
    seen: Tensor
    """[B, T] number of tokens before each."""
    budget: float
    """Share of the dense decoder-layer FLOPs that may be spent; 1 if there is no budget."""
    feedback: Tensor | None = None
    """[B, T, 3] entropy and largest probability of the distribution that each token was drawn from, and the share of
    dense FLOPs that its sequence has spent before it; None if no signal needs that.
    """


class Profiler(ABC):
    """What measures the state of tokens."""

    names: ClassVar[tuple[str, ...]]
    """Signals this profiler knows."""
    feedback: ClassVar[frozenset[str]] = frozenset()
    """Signals that depend on the model's own output for earlier tokens."""

    @abstractmethod
    def observe(self, observation: Observation, names: tuple[str, ...]) -> Tensor:
        """Return the named signals [B, T, F], in that order, on the device of the hidden states."""
