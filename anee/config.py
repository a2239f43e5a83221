"""`ANEEConfig`: the first system's configuration, kept working."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ANEEConfig:
    """What to load and how much of it to run.

    ``energy_budget`` is the share of the dense decoder-layer FLOPs that may be spent, in (0, 1]; ``policy`` a policy
    string, ``device`` and ``dtype`` as in `anee.load`.
    """

    model_name: str = "gpt2"
    energy_budget: float = 0.75
    policy: str = "heuristic"
    device: str | None = None
    dtype: str | None = None
