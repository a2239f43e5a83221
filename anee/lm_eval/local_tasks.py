"""lm-eval tasks from JSONL files on disk, where no hub can be reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anee_core.errors import InputError

_METRICS = {"acc": "mean", "acc_norm": "mean", "perplexity": "perplexity"}
_KINDS: dict[frozenset[str], dict[str, Any]] = {
    frozenset({"context", "continuation"}): {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "metrics": ("acc", "perplexity"),
    },
    frozenset({"query", "choices", "gold"}): {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}Answer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metrics": ("acc", "acc_norm"),
    },
    frozenset({"context_options", "continuation", "gold"}): {
        "output_type": "multiple_choice",
        "doc_to_text": "{{gold}}",
        "doc_to_choice": "{{context_options}}",
        "doc_to_target": "{{continuation}}",
        "metrics": ("acc",),
    },
}


def local_task(path: str | Path) -> dict[str, Any]:
    """Return the config of an lm-eval task for a JSONL file, named like the file.

    Each line has the keys of one of three kinds: ``context`` and ``continuation`` (is the continuation the likeliest
    one?), ``query``, ``choices`` and ``gold`` (which choice is likeliest after the query?), or ``context_options``,
    ``continuation`` and ``gold`` (after which context is the continuation likeliest?).

    Raises:
        InputError: the file is not there, or of no such kind.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as lines:
            first = json.loads(lines.readline())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read a task from {path}: {error}") from error
    kind = next((kind for keys, kind in _KINDS.items() if isinstance(first, dict) and keys == set(first)), None)
    if kind is None:
        known = "; ".join(", ".join(sorted(keys)) for keys in _KINDS)
        found = sorted(first) if isinstance(first, dict) else type(first).__name__
        raise InputError(f"{path}: the keys of a line are those of one kind of task ({known}); found {found}")
    metrics = [
        {"metric": metric, "aggregation": _METRICS[metric], "higher_is_better": metric != "perplexity"}
        for metric in kind["metrics"]
    ]
    return {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "num_fewshot": 0,
        "metric_list": metrics,
        **{key: value for key, value in kind.items() if key != "metrics"},
    }


def find_tasks(names: list[str], folder: Path | None) -> list[Any]:
    """Return what lm-eval takes as tasks: files ``NAME.jsonl`` of a folder where they exist, otherwise names.

    Raises:
        InputError: the folder is not there, one of its files is of no known kind, or a file is given for a name.
    """
    for name in names:
        if name.endswith((".yaml", ".yml", ".jsonl")):
            raise InputError(f"a task goes by its name; for the file '{name}', name its folder: --tasks-dir FOLDER")
    if folder is None:
        return list(names)
    if not folder.is_dir():
        raise InputError(f"there is no folder '{folder}' with tasks")
    files = {name: folder / f"{name}.jsonl" for name in names}
    return [local_task(file) if file.exists() else name for name, file in files.items()]
