"""`ANEEConfig`: the first system's configuration, kept working."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ANEEConfig:
    """What to load and how much of it to run."""

    model_name: str = "gpt2"
    """Model to load, as `anee.load` takes it."""
    energy_budget: float = 0.75
    """Share of the dense decoder-layer FLOPs that may be spent, in (0, 1]."""
    policy: str = "heuristic"
    """A policy string."""
    device: str | None = None
    """Where to run, as for `anee.load`."""
    dtype: str | None = None
    """Type of the weights, as for `anee.load`."""
