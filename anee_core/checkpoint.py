"""A folder with a JSON header and tensors: how policies and what was trained for them are kept. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anee_core.errors import CheckpointError
from anee_core.files import write_whole

_SCHEMA = 1


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

    def write(self, folder: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint; the header gets the schema's version and the sizes of the tensors.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        path = Path(folder)
        sizes = {
            size: n for name, shape in self.shapes.items() for size, n in zip(shape, tensors[name].shape, strict=True)
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
            stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            write_whole(path / self.tensors, lambda draft: save_file(stored, draft))
            write_whole(path / self.header, json.dumps({"schema": _SCHEMA, **sizes, **header}, indent=2) + "\n")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write the {self.what} to {path}: {error}") from error

    def copy(self, source: str | Path, folder: str | Path) -> None:
        """Copy a checkpoint, without what else its folder holds.

        Raises:
            CheckpointError: it cannot be read, or the folder cannot be written.
        """
        self.write(folder, *self.read(source))

    def read(self, folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the header, without version and sizes, and the tensors.

        Raises:
            CheckpointError: a file is missing, corrupt or of another schema, or does not hold what it should.
        """
        path = Path(folder)
        for file in (path / self.header, path / self.tensors):
            if not file.exists():
                raise CheckpointError(f"{file} is missing; {self.missing}")
        try:
            header = json.loads((path / self.header).read_text())
            tensors = load_file(path / self.tensors)
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, OSError) as error:
            raise CheckpointError(f"the {self.what} in {path} is corrupt ({error}); {self.remedy}") from error
        if not isinstance(header, dict) or header.pop("schema", None) != _SCHEMA:
            raise CheckpointError(f"{path / self.header} is not of schema {_SCHEMA}; {self.renew}")
        return self._checked(path, header, tensors) if self.shapes else header, tensors

    def _checked(self, path: Path, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the header without the sizes, if nothing is missing, nothing extra, and every number finite."""
        sizes = {size for shape in self.shapes.values() for size in shape}
        if set(header) != sizes | self.facts:
            raise CheckpointError(
                f"keys of the {self.what} in {path}: found {sorted(header)}, expected {sorted(sizes | self.facts)}; "
                f"{self.remedy}"
            )
        expected = {name: tuple(header[size] for size in shape) for name, shape in self.shapes.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected or not all(t.is_floating_point() and t.isfinite().all() for t in tensors.values()):
            raise CheckpointError(
                f"tensors of the {self.what} in {path}: found {found}, expected finite {expected}; {self.remedy}"
            )
        return {key: value for key, value in header.items() if key in self.facts}
