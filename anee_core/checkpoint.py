"""A folder with a JSON header and tensors: how policies and what was trained for them are kept. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anee_core.errors import CheckpointError

_SCHEMA = 1


@dataclass(frozen=True)
class CheckpointFormat:
    """One kind of checkpoint: ``NAME.json`` and ``NAME.safetensors`` in a folder.

    Args:
        name: of both files.
        what: is kept there, for messages.
        missing: what to tell who has no such folder.
        remedy: what to do about a corrupt one.
        renew: what to do about one of another version.
    """

    name: str
    what: str
    missing: str
    remedy: str
    renew: str

    @property
    def header(self) -> str:
        """Name of the header."""
        return f"{self.name}.json"

    @property
    def tensors(self) -> str:
        """Name of the file with the tensors."""
        return f"{self.name}.safetensors"

    def write(self, folder: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint; the header gets the schema's version.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path / self.tensors)
            (path / self.header).write_text(json.dumps({"schema": _SCHEMA, **header}, indent=2) + "\n")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write the {self.what} to {path}: {error}") from error

    def copy(self, source: str | Path, folder: str | Path) -> None:
        """Copy a checkpoint, without what else its folder holds.

        Raises:
            CheckpointError: it cannot be read, or the folder cannot be written.
        """
        self.write(folder, *self.read(source))

    def read(self, folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the header, without its version, and the tensors.

        Raises:
            CheckpointError: a file is missing, corrupt or of another schema.
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
        return header, tensors
