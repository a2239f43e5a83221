"""Compile the C++ sources for the processor at hand, once, and load the library."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from rich.console import Console

from anee_core.files import cache_folder
from anee_core.steps.native.structs import LAYOUT

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).parent / "cpp" / "library.cpp"
"""The source that includes all others in its folder."""
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp",
    # Sums may be taken in any order; NaN and infinity keep their meaning.
    "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros",
)  # fmt: skip


class NoLibraryError(Exception):
    """There is no compiled library, and the message says why."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Return the library; compile it if this was not done before on this machine.

    ``$CXX``, or else g++, compiles it into ANEE's cache folder.

    Raises:
        NoLibraryError: there is no compiler, or it failed.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise NoLibraryError("there is no g++ (install it, or set CXX)")
    try:
        source = b"".join(path.read_bytes() for path in sorted(_SOURCE.parent.glob("*.[ch]*")))
        known = hashlib.sha256(source + " ".join((compiler, *_FLAGS, _processor())).encode()).hexdigest()[:16]
        path = cache_folder() / "native" / f"layer-{known}.so"
        if not path.exists():
            logger.info("compiling the fast layer step into %s", path)
            with Console(stderr=True).status("compiling the fast layer step for this processor, once (a few seconds)"):
                _compile(compiler, path)
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoLibraryError(f"it cannot be kept or loaded: {error}") from error
    _check_layout(loaded)
    pointer, count = ctypes.c_void_p, ctypes.c_int32
    loaded.anee_multiplies_bf16.argtypes, loaded.anee_multiplies_bf16.restype = [], count
    loaded.anee_run.argtypes, loaded.anee_run.restype = [pointer, pointer], None
    loaded.anee_project.argtypes, loaded.anee_project.restype = [pointer, pointer], None
    loaded.anee_stack.argtypes, loaded.anee_stack.restype = [pointer, pointer], None
    loaded.anee_linear.argtypes = [pointer, pointer, pointer, count, count, pointer, count]
    loaded.anee_linear.restype = None
    loaded.anee_norm.argtypes = [pointer, pointer, pointer, count, count, count, pointer]
    loaded.anee_norm.restype = None
    return loaded


def _check_layout(loaded: ctypes.CDLL) -> None:
    """Raise `NoLibraryError` unless the library's structs and constants are those of ``structs.py``.

    It would otherwise read and write where it must not.
    """
    found = (ctypes.c_int32 * (len(LAYOUT) + 1))()
    loaded.anee_layout.argtypes, loaded.anee_layout.restype = [ctypes.c_void_p], ctypes.c_int32
    count = loaded.anee_layout(ctypes.addressof(found))
    if count != len(LAYOUT) or tuple(found[:count]) != LAYOUT:
        raise NoLibraryError(f"its structs are other ones: {found[:count]} and not {list(LAYOUT)}")


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [*compiler.split(), *_FLAGS, str(_SOURCE)]
    if platform.machine() in ("x86_64", "AMD64"):
        command.append("-mprefer-vector-width=512")
    # torch's own OpenMP, where it brings one: two of them in a process would fight for the cores.
    own = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if own.exists():
        command.append(str(own))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoLibraryError(f"{compiler} failed: {done.stderr.strip()[-300:]}")
        os.replace(made, path)  # whole or not at all, if several processes compile


def _processor() -> str:
    """Return what identifies the kind of processor: code compiled for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
