"""Measurements kept on disk record by record, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch


class Records:
    """Records by key in a JSON file. A file with another setting is begun anew."""

    def __init__(self, file: Path, setting: dict[str, Any]) -> None:
        self._file, self.setting = file, json.loads(json.dumps(setting))
        found = json.loads(file.read_text()) if file.exists() else {}
        self._records: dict[str, dict[str, Any]] = found["records"] if found.get("setting") == self.setting else {}
        file.parent.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Keep a record."""
        self._records[key] = record
        facts = {"machine": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        whole = {"setting": self.setting, **facts, "records": self._records}
        self._file.write_text(json.dumps(whole, indent=2) + "\n")

    def all(self) -> list[dict[str, Any]]:
        """Return the records in the order in which they were added."""
        return list(self._records.values())
