"""How a training run goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anee_core.errors import InputError
from anee_core.ranges import Count, CountOrNone, Seed, Weight, check_numbers


@dataclass(frozen=True)
class RunOptions:
    """How a run goes."""

    folder: Path
    """Where checkpoints and logs go; a run found there is continued."""
    steps: CountOrNone
    """Optimiser steps; with 0 what the run starts from is written as it would be after training."""
    accumulate: Count = 1
    """Batches per step."""
    clip: Weight = 1.0
    """Largest gradient norm; 0 for no clipping."""
    precision: str = "no"
    """Mixed precision: "no", "bf16" or "fp16"."""
    seed: Seed = 0
    """Seed of everything random."""
    validate_every: CountOrNone = 100
    """Steps between validations; 0 for none but the last."""
    save_every: Count = 50
    """Steps between checkpoints."""
    progress: bool = True
    """Whether to show a bar."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"a run is kept in a folder, and '{self.folder}' is a file; choose another name")
        if self.precision not in ("no", "bf16", "fp16"):
            raise InputError(f"precision is 'no', 'bf16' or 'fp16'; got '{self.precision}'")
