"""Progress bars for long work, and figures of matplotlib, which is optional."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anee_core.errors import InputError, MissingPackageError
from anee_core.files import writable, write_whole


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


def picture(path: Path) -> Path:
    """Return the place of a picture, once it is known that one can be drawn and written there.

    Raises:
        InputError: its name ends as no picture's does.
        MissingPackageError: matplotlib is not installed.
        OutputError: it cannot be written.
    """
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise InputError(f"a picture's name ends in {', '.join(f'.{kind}' for kind in known)}; got '{path}'")
    return writable(path)


def save_figure(figure: Any, path: Path, dpi: int = 130) -> None:
    """Write a figure of matplotlib as a picture.

    Raises:
        InputError, OutputError: see `picture`.
    """
    kind = picture(path).suffix[1:].lower()
    write_whole(path, lambda draft: figure.savefig(draft, dpi=dpi, format=kind))


def progress_bar(show: bool, transient: bool = False) -> Progress:
    """Return a bar on stderr with description, count and time left; ``transient`` wipes it at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show, transient=transient)
