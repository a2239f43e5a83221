"""Figures of matplotlib, which is optional."""

from __future__ import annotations

from typing import Any

from anee_core.errors import MissingPackageError


def new_figure(width: float, height: float) -> Any:
    """Return an empty `matplotlib.figure.Figure` of a size in inches.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("pictures need matplotlib: pip install 'anee[plot]'") from error
    return Figure(figsize=(width, height))
