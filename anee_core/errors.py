"""Every failure a user can cause, as one readable error that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AneeError(Exception):
    """Base of all errors that ANEE raises on purpose."""


class InputError(AneeError, ValueError):
    """A prompt, mask, shape or option that cannot be run."""


class ModelError(AneeError, ValueError):
    """A model that cannot be loaded or that ANEE does not support."""


class AdapterError(AneeError):
    """An adapter whose table of names does not fit the model."""


class PolicyError(AneeError, ValueError):
    """An unknown policy, a wrong option, or a policy that does not fit the model."""


class BudgetError(PolicyError):
    """A compute budget that is out of range or cannot be met."""

    def __init__(self, message: str, least: float | None = None) -> None:
        super().__init__(message)
        self.least = least
        """Smallest budget that could be met, where the error is that the given one is below it."""


class CheckpointError(AneeError):
    """A saved policy or calibration that is missing, corrupt or of another model."""


class OutputError(AneeError, OSError):
    """A file or folder that cannot be written, or a disk that is full."""


class TrainingError(AneeError):
    """A training run that cannot go on."""


class PluginError(AneeError):
    """A plugin that is broken or clashes with another."""


class CacheError(AneeError):
    """A cache operation that cannot be carried out exactly."""


class MissingPackageError(AneeError, ImportError):
    """An optional package that is needed for what was asked."""


_FEW = 60
"""As many names as are worth listing in an error."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a sentence fragment listing ``known``, if they are few, with the closest match to ``name`` first."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{close[0]}'?" if close else ""
    if len(names) > _FEW:
        return hint or "nothing known has a similar name"
    return f"{hint} known: {', '.join(names) if names else 'none'}".strip()
