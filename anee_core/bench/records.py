"""Measurements kept on disk record by record, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from anee_core.errors import InputError
from anee_core.files import only_one, writable, write_whole

_ENDINGS = (".json", ".md", ".png")


def ending(out: Path, suffix: str) -> Path:
    """Return OUT with a suffix, for one of several files that belong together. A dot in its name stays."""
    stem = out.name.removesuffix(out.suffix) if out.suffix in _ENDINGS else out.name
    return out.with_name(stem + suffix)


class Records:
    """Records by key in a JSON file, all measured with one setting.

    Raises:
        InputError: the file holds other things, or records of another setting.
        OutputError: the file cannot be written.
    """

    def __init__(self, file: Path, setting: dict[str, Any]) -> None:
        self._file, self.setting = file, json.loads(json.dumps(setting))
        self._records: dict[str, dict[str, Any]] = {}
        if file.exists():
            try:
                known = json.loads(file.read_text())
                found, self._records = known["setting"], dict(known["records"])
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise InputError(f"{file} holds no measurements ({error}); choose another name") from error
            different = sorted(k for k in {*found, *self.setting} if found.get(k) != self.setting.get(k))
            if different:
                changes = ", ".join(f"{k} was {found.get(k)}, is {self.setting.get(k)}" for k in different)
                raise InputError(f"{file} holds measurements with another setting ({changes}); choose another name")
        writable(file)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Keep a record."""
        with only_one(self._file):
            # Another run may have added to the same file meanwhile.
            known = json.loads(self._file.read_text())["records"] if self._file.exists() else {}
            self._records = {**self._records, **known, key: record}
            self._write()

    def _write(self) -> None:
        facts = {"machine": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        known = {"setting": self.setting, **facts, "records": self._records}
        write_whole(self._file, json.dumps(known, indent=2) + "\n")

    def all(self) -> list[dict[str, Any]]:
        """Return the records in the order in which they were added."""
        return list(self._records.values())


def processor() -> str:
    """Return the processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    bf16 = any("avx512_bf16" in line for line in lines)
    return f"{named}{' with AVX512-BF16' if bf16 else ''}"
