"""Where ANEE keeps what it measured or compiled on this machine, and how files are read and written."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from anee_core.errors import InputError

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return $ANEE_CACHE, or anee/ in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anee"
    return Path(os.environ.get("ANEE_CACHE") or default)


def write_whole(path: Path, content: str | Callable[[Path], object]) -> None:
    """Write a file whole or not at all, whatever interrupts it: beside its place, and then renamed.

    Args:
        path: its place, in a folder that exists.
        content: the text, or what writes the file at a given path.

    Raises:
        OSError: it cannot be written.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if isinstance(content, str):
            draft.write_text(content, encoding="utf-8")
        else:
            content(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def only_one(place: Path) -> Iterator[None]:
    """Let one process or thread at a time write a file or a folder; others wait, and say so.

    The lock is a hidden file beside it. Where none can be made, nothing can be written either, and nobody waits.
    """
    lock: BaseFileLock | None = None
    place = place.resolve()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.with_name(f".{place.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("another process writes %s: waiting for it", place)
            lock.acquire()
    except OSError as error:
        logger.debug("no lock beside %s: %s", place, error)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def read_text(path: str | Path, what: str = "text") -> str:
    """Return a UTF-8 text.

    Raises:
        InputError: there is no such file, or it is no text.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no {what} file '{path}'")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the {what} {path}: {error}") from error
