"""Progress bars for long work, and figures of matplotlib, which is optional."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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


def progress_bar(show: bool, transient: bool = False) -> Progress:
    """Return a bar on stderr with description, count and time left; ``transient`` wipes it at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show, transient=transient)
