"""Where ANEE keeps what it measured or compiled on this machine, and how files are read and written."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from anee_core.errors import InputError, OutputError

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder() -> Path:
    """Return $ANEE_CACHE, or anee/ in the user's cache folder.

    Raises:
        InputError: there is no home directory, and nothing says where else.
    """
    if os.environ.get("ANEE_CACHE"):
        return Path(os.environ["ANEE_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anee"
    except RuntimeError as error:
        raise InputError("there is no home directory to keep a cache in: set ANEE_CACHE to a folder") from error


@contextmanager
def writing(place: Path, need: int = 0) -> Iterator[None]:
    """Turn what goes wrong while something is written into one line: where, why, and what to do.

    Args:
        place: what is written.
        need: bytes that it takes, where that is known.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:  # libraries have errors of their own, behind which a full disk may be
        from safetensors import SafetensorError  # not before it is needed: a command's help reads this file

        full = next((code for each in _behind(error) if (code := _code(each)) in _FULL), None)
        if full is None and not isinstance(error, (OSError, SafetensorError)):
            raise
        code = full or _code(error)
        why = " ".join(str(error).split()) if code is None else os.strerror(code)
        if code in _FULL:
            needed = f"{_size(need)} are needed and " if need else ""
            why += f" ({needed}{_size(_free(place))} are free); make room, or"
        raise OutputError(f"cannot write {place}: {why}{' ' if code in _FULL else '; '}{_elsewhere(place)}") from error


def write_whole(path: Path, content: str | Callable[[Path], object]) -> None:
    """Write a file whole or not at all, whatever interrupts it: beside its place, and then renamed.

    A pipe or a device is written as it is.

    Args:
        path: its place, in a folder that exists.
        content: the text, or what writes the file at a given path.

    Raises:
        OutputError: it cannot be written.
    """

    def fill(place: Path) -> None:
        if isinstance(content, str):
            place.write_text(content, encoding="utf-8")
        else:
            content(place)

    with writing(path):
        if path.exists() and not path.is_file():
            fill(path)
            return
        path = path.resolve()  # a link stays one
        draft = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_native_id()}.tmp")
        try:
            fill(draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def write_folder(folder: Path, content: Callable[[Path], object]) -> None:
    """Write a folder whole or not at all: beside its place, and then renamed; what is there gives way to it.

    Args:
        folder: its place.
        content: what fills the folder at a given path.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
            draft = Path(beside) / folder.name
            draft.mkdir()
            content(draft)
            if folder.exists():
                folder.rename(Path(beside) / "old")
            draft.rename(folder)


def writable(path: Path) -> Path:
    """Return the place of a file, once it is known that it can be written: before long work, not after.

    Its folder is made.

    Raises:
        OutputError: it cannot be written, or is a folder.
    """
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _try_folder(path.resolve().parent)
    return path


def writable_folder(folder: Path, need: int = 0) -> Path:
    """Return a folder that is there, once it is known that files can be made in it, of ``need`` bytes altogether.

    Raises:
        OutputError: they cannot.
    """
    with writing(folder, need):
        _try_folder(folder)
        if _free(folder) < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return folder


def allocate(path: Path, size: int) -> None:
    """Take the disk space of a file of ``size`` bytes that is there: a memory map would tell of a full disk by SIGBUS.

    Raises:
        OSError: the disk has too little.
    """
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:  # not every system, and not every kind of disk, can
        if _code(error) in _FULL or _free(path) < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


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
    except (OSError, NotImplementedError) as error:
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


def _try_folder(folder: Path) -> None:
    if folder.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what led to it, and what led to that."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _code(error: BaseException) -> int | None:
    """Return the system's number of an error, which what is written in Rust has only in its message."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"os error (\d+)", str(error))
    return int(told[1]) if told else None


def _free(place: Path) -> int:
    """Return the bytes that are free where a place is or will be."""
    there = next(parent for parent in (place, *place.resolve().parents) if parent.exists())
    return shutil.disk_usage(there).free


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _elsewhere(place: Path) -> str:
    """Return what to do about a place that cannot be written."""
    try:
        cached = place.resolve().is_relative_to(cache_folder().resolve())
    except InputError:
        cached = False
    return "set ANEE_CACHE to another folder" if cached else "choose another place"
