"""How tasks are scored. It imports nothing heavy, so that a command line can read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anee_core.ranges import Count, Size, check_numbers


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are scored."""

    tasks_dir: Path | None = None
    """Folder with tasks of your own: NAME.jsonl, or YAML files as lm-eval takes them."""
    limit: Count | None = None
    """Examples per task."""
    mode: str = "parallel"
    """How a text is scored: parallel, or decode: token by token, as an audit."""
    batch: Size = 1
    """Examples at once."""
    dtype: str | None = None
    """Type of the weights: float32, bfloat16 or float16. Default: as stored."""
    device: str | None = None
    """Where to run, like cuda:0."""

    def __post_init__(self) -> None:
        check_numbers(self)
