"""How a model is calibrated. It imports nothing heavy, so that a command line can read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from anee_core.errors import InputError


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate."""

    text: str | Path | None = None
    """A file to read instead of the model's own samples; None for the samples."""
    sequences: int = 4
    """Number of sequences to measure on."""
    length: int | None = None
    """Tokens of each sequence. None: 96, or the model's context if that is shorter."""
    seed: int = 0
    """Seed of the samples."""
    folder: str | Path | None = None
    """Folder that keeps the results. None: the user's cache folder."""
    progress: bool = True
    """Whether to show a bar."""

    def check(self) -> None:
        """Raise `InputError` if the text file is not there."""
        if self.text is not None and not Path(self.text).is_file():
            raise InputError(f"cannot read the calibration text {self.text}: there is no such file")


@dataclass(frozen=True)
class FitOptions:
    """How shortcuts and gate are fitted."""

    rank: int = 128
    """Width of the shortcuts."""
    ridge: float = 1e-3
    """What is added to the diagonal of the inputs' second moments, as a share of its mean."""
    skipped: float = 0.25
    """Share of (layer, token) pairs that take their new shortcut during the fit, so that later layers are fitted on
    hidden states such as they will see.
    """
    batch: int = 4
    """Sequences at once."""
    seed: int = 0
    """Seed of the draw of pairs that take their shortcut."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.batch < 1:
            raise InputError("rank and batch are at least 1")
        if self.ridge <= 0 or not 0 <= self.skipped < 1:
            raise InputError(f"ridge is above 0 and skipped lies in [0, 1); got {self.ridge:g} and {self.skipped:g}")


@dataclass(frozen=True)
class GateCalibration:
    """How a gate is calibrated."""

    text: str | Path | None = None
    """A file to read instead of the model's own samples."""
    sequences: int = 32
    """Number of sequences to fit on."""
    length: int = 512
    """Tokens of each sequence."""
    fit: FitOptions = field(default_factory=FitOptions)
    """How shortcuts and gate are fitted."""
    progress: bool = True
    """Whether to show bars."""

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise InputError(f"a calibration takes at least 1 sequence; got {self.sequences}")
        if self.text is not None and not Path(self.text).is_file():
            raise InputError(f"cannot read the calibration text {self.text}: there is no such file")
