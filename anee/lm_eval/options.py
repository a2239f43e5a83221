"""How tasks are scored. Imports nothing heavy, so that a command line can read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are scored.

    Args:
        tasks_dir: folder with NAME.jsonl, for tasks without a hub.
        limit: examples per task.
        mode: parallel, or decode: token by token, an audit.
        batch: examples at once.
        dtype: of the model: float32, bfloat16 or float16. Default: as stored.
        device: where to run, like cuda:0.
    """

    tasks_dir: Path | None = None
    limit: int | None = None
    mode: str = "parallel"
    batch: int = 1
    dtype: str | None = None
    device: str | None = None
