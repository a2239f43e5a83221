"""A folder with a JSON header and tensors: how policies and what was trained for them are kept. Nothing is pickled."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from anee_core.errors import CheckpointError
from anee_core.files import writable_folder, write_whole

_SCHEMA = 2
_TEXT, _NUMBERS = 1 << 20, 1 << 30
"""Most bytes of a header, and most numbers of a checkpoint: several times those for the largest models."""
_FREE = 1 << 17
"""Most numbers where the header names no sizes."""
_LARGEST = 1e6
"""Largest size of a number. Real ones stay below 1,000; from 1e15 on, sums of squares overflow."""
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class CheckpointFormat:
    """One kind of checkpoint: ``NAME.json`` and ``NAME.safetensors`` in a folder."""

    name: str
    """Name of both files, without their endings."""
    what: str
    """What is kept there, as messages call it."""
    missing: str
    """What messages tell who has no such folder."""
    remedy: str
    """What messages say to do about a corrupt checkpoint."""
    renew: str
    """What messages say to do about a checkpoint of another version."""
    shapes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Shape of each tensor, in sizes that the header names; empty for any tensors."""
    facts: frozenset[str] = frozenset()
    """Names of what else the header says."""

    @property
    def header(self) -> str:
        """Name of the header."""
        return f"{self.name}.json"

    @property
    def tensors(self) -> str:
        """Name of the file with the tensors."""
        return f"{self.name}.safetensors"

    def write(self, folder: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
        """Write a checkpoint, and return its checksum.

        The header gets the schema's version, the sizes of the tensors, and the checksum.

        Raises:
            OutputError: the folder cannot be written.
        """
        path = Path(folder)
        sizes = {
            size: n for name, shape in self.shapes.items() for size, n in zip(shape, tensors[name].shape, strict=True)
        }
        stored = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        # As it will be read back: tuples become lists.
        said = json.loads(json.dumps({"schema": _SCHEMA, **sizes, **header}))
        said["checksum"] = checksum(said, stored)
        writable_folder(path)
        write_whole(path / self.tensors, lambda draft: draft.write_bytes(stored))
        write_whole(path / self.header, json.dumps(said, indent=2) + "\n")
        return str(said["checksum"])

    def copy(self, source: str | Path, folder: str | Path) -> str:
        """Copy a checkpoint, without what else its folder holds, and return the copy's checksum.

        Raises:
            CheckpointError: it cannot be read.
            OutputError: the folder cannot be written.
        """
        return self.write(folder, *self.read(source))

    def read(self, folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the header, without version, sizes and checksum, and the tensors.

        What does not have the header's sizes is not read at all.

        Raises:
            CheckpointError: a file is missing, corrupt or of another schema, or does not hold what it should.
        """
        path = Path(folder)
        header = self._header(path)
        sizes = self._sizes(path, header)
        expected = {name: tuple(sizes[size] for size in shape) for name, shape in self.shapes.items()}
        numbers = sum(map(math.prod, expected.values())) if expected else _FREE
        try:
            if numbers > _NUMBERS:
                raise ValueError(f"its header claims {numbers:,} numbers, more than the {_NUMBERS:,} that it may have")
            stored = _read(path / self.tensors, 8 * numbers + _TEXT)
            if header.pop("checksum", None) != checksum(header, stored):
                raise ValueError("its checksum is another than when it was saved")
            tensors = load(stored)
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, RecursionError) as error:
            raise self._corrupt(path, error) from error
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if (expected and found != expected) or not all(map(sound, tensors.values())):
            raise CheckpointError(
                f"tensors of the {self.what} in {path}: found {found!s:.300}, expected plain numbers below "
                f"{_LARGEST:,.0f} in size, of shapes {expected or 'as saved'}; {self.remedy}"
            )
        return {key: value for key, value in header.items() if key not in sizes and key != "schema"}, tensors

    def checksum_of(self, folder: str | Path) -> Any:
        """Return the checksum that the header of a checkpoint names.

        Raises:
            CheckpointError: it cannot be read, or is of another schema.
        """
        return self._header(Path(folder)).get("checksum")

    def _header(self, path: Path) -> dict[str, Any]:
        """Return the header, if it is one of this schema."""
        for file in (path / self.header, path / self.tensors):
            if not os.path.exists(file):
                raise CheckpointError(f"{file} is missing; {self.missing}")
        try:
            header = json.loads(_read(path / self.header, _TEXT))
        except (OSError, ValueError, RecursionError) as error:
            raise self._corrupt(path, error) from error
        if not isinstance(header, dict) or header.get("schema") != _SCHEMA:
            raise CheckpointError(f"{path / self.header} is not of schema {_SCHEMA}; {self.renew}")
        return header

    def _sizes(self, path: Path, header: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes that a header names, if it names all of them and nothing that it should not."""
        names = {size for shape in self.shapes.values() for size in shape}
        wanted = names | self.facts | {"schema", "checksum"}
        if self.shapes and set(header) != wanted:
            raise CheckpointError(
                f"keys of the {self.what} in {path}: found {sorted(header)!s:.300}, expected {sorted(wanted)}; "
                f"{self.remedy}"
            )
        sizes = {name: header[name] for name in names}
        if any(type(size) is not int or not 1 <= size <= _NUMBERS for size in sizes.values()):
            raise CheckpointError(
                f"sizes of the {self.what} in {path} are whole numbers from 1 to {_NUMBERS:,}; got {sizes!s:.300}; "
                f"{self.remedy}"
            )
        return sizes

    def _corrupt(self, path: Path, error: Exception) -> CheckpointError:
        return CheckpointError(f"the {self.what} in {path} is corrupt ({error!s:.200}); {self.remedy}")


def checksum(header: Mapping[str, Any], stored: bytes) -> str:
    """Return the SHA-256 of what a header says, whatever its layout, and of the file with the tensors.

    It tells damage and edits from what was saved; it does not say who saved it.
    """
    said = json.dumps(header, sort_keys=True).encode()
    return hashlib.sha256(said + hashlib.sha256(stored).digest()).hexdigest()


def sound(tensor: Tensor) -> bool:
    """Return whether a tensor holds plain numbers: floating-point ones of a common type, finite and not too large."""
    return tensor.dtype in _DTYPES and bool((tensor.float().abs() <= _LARGEST).all())


def _read(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file that has at most ``limit``. It never waits, as a pipe would let it."""
    if not os.path.isfile(path):
        raise OSError(f"{path.name} is no regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(f"{path.name} has {size:,} bytes, more than the {limit:,} that it may have")
        return file.read(size)
