"""Checkpoints of a run, which resume bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator

from anee_core.training.run_options import RunOptions

_CHANGEABLE = frozenset({"rate", "backbone_rate", "valid_blocks"})
"""Settings that a run may go on with though they were others before."""


def run_identity(options: RunOptions, accelerator: Accelerator) -> dict[str, Any]:
    """Return what must be the same for a run to go on as if it had not stopped. More steps may be asked for."""
    chosen = asdict(options)
    same = {name: chosen[name] for name in ("accumulate", "clip", "precision", "seed")}
    return {**same, "processes": accelerator.num_processes}


def lasting_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, nested ones too, that must stay as they are."""
    return {
        name: lasting_settings(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in _CHANGEABLE
    }


def random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
