"""How a model is calibrated. It imports nothing heavy, so that a command line can read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from anee_core.errors import InputError
from anee_core.ranges import Length, Positive, Seed, Size, Within, check_numbers


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate."""

    text: str | Path | None = None
    """A file to read instead of the model's own samples; None for the samples."""
    sequences: Size = 4
    """Number of sequences to measure on."""
    length: Length | None = None
    """Tokens of each sequence. None: 96, or the model's context if that is shorter."""
    seed: Seed = 0
    """Seed of the samples."""
    folder: str | Path | None = None
    """Folder that keeps the results. None: the user's cache folder."""
    progress: bool = True
    """Whether to show a bar."""

    def __post_init__(self) -> None:
        check_numbers(self)
        _check_text(self.text)


@dataclass(frozen=True)
class FitOptions:
    """How shortcuts and gate are fitted."""

    rank: Size = 128
    """Width of the shortcuts."""
    ridge: Positive = 1e-3
    """What is added to the diagonal of the inputs' second moments, as a share of its mean."""
    skipped: Annotated[float, Within(0, 1, whole=False, without_most=True)] = 0.25
    """Share of (layer, token) pairs that take their new shortcut during the fit, so that later layers are fitted on
    hidden states such as they will see.
    """
    batch: Size = 4
    """Sequences at once."""
    seed: Seed = 0
    """Seed of the draw of pairs that take their shortcut."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class GateCalibration:
    """How a gate is calibrated."""

    text: str | Path | None = None
    """A file to read instead of the model's own samples."""
    sequences: Size = 32
    """Number of sequences to fit on."""
    length: Length = 512
    """Tokens of each sequence."""
    fit: FitOptions = field(default_factory=FitOptions)
    """How shortcuts and gate are fitted."""
    progress: bool = True
    """Whether to show bars."""

    def __post_init__(self) -> None:
        check_numbers(self)
        _check_text(self.text)


def _check_text(text: str | Path | None) -> None:
    """Raise `InputError` for a text file that is not there."""
    if text is not None and not Path(text).is_file():
        raise InputError(f"cannot read the calibration text {text}: there is no such file")
