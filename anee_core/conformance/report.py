"""What the checks found: results, tables, JSON."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from anee_core.conformance.check import Check
from anee_core.files import writable, write_whole

_COLUMNS = 6
"""Subjects side by side in one table."""
_NOT_RUN = "not run"


@dataclass(frozen=True)
class Result:
    """Result of one check of one subject."""

    subject: str
    """Name of what was checked."""
    kind: str
    """Model type of the subject, or "policy" for a policy."""
    check: str
    """Name of the check."""
    passed: bool
    """Whether the promise holds."""
    seconds: float
    """Seconds that the check took."""
    failure: str | None = None
    """What was expected, what was found and where to look, in one line; None if the check passed."""

    @property
    def not_run(self) -> bool:
        """Whether it failed only because an earlier check did, without which it makes no sense."""
        return self.failure is not None and self.failure.startswith(_NOT_RUN)


@dataclass
class Report:
    """The results of a run, and the versions it ran with."""

    results: list[Result] = field(default_factory=list)
    """Results in the order in which checks ran."""
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    """Versions of Python and packages, by name."""

    @property
    def passed(self) -> bool:
        """Whether no check failed, and there was at least one."""
        return bool(self.results) and all(result.passed for result in self.results)

    @property
    def failures(self) -> list[Result]:
        """The results of the checks that failed."""
        return [result for result in self.results if not result.passed]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, ready for JSON."""
        return {"versions": self.versions, "passed": self.passed, "results": [asdict(r) for r in self.results]}

    def save(self, path: Path) -> None:
        """Write the report as JSON, a result a line."""
        whole = self.to_dict()
        results = ",\n".join(json.dumps(result) for result in whole.pop("results"))
        write_whole(writable(path), json.dumps(whole)[:-1] + f', "results": [\n{results}\n]}}\n')

    def print(self, console: Console) -> None:
        """Print a table of checks and subjects, then one line for each failure."""
        subjects = list(dict.fromkeys(result.subject for result in self.results))
        for start in range(0, len(subjects), _COLUMNS):
            shown = subjects[start : start + _COLUMNS]
            table = Table("check", *(escape(name) for name in shown))
            for name in dict.fromkeys(result.check for result in self.results):
                cells = {r.subject: r for r in self.results if r.check == name}
                table.add_row(name, *(_cell(cells.get(subject)) for subject in shown))
            console.print(table)
        for result in self.failures:
            if result.not_run:
                continue
            console.print(f"{result.subject}: {result.check}: {result.failure}", markup=False, soft_wrap=True)
        console.print(
            f"{len(self.results) - len(self.failures)} of {len(self.results)} checks passed "
            f"({', '.join(f'{name} {number}' for name, number in self.versions.items())})",
            markup=False,
        )


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    if result.not_run:
        return _NOT_RUN
    return "[green]passed[/green]" if result.passed else "[red]FAILED[/red]"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("anee", "transformers", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def run_checks(
    subjects: Iterable[tuple[str, str, Any]], checks: Sequence[Check[Any]], console: Console | None = None
) -> Report:
    """Run every check on every subject, given as (name, kind, subject), with a progress bar on ``console``."""
    report = Report()
    listed = list(subjects)
    with Progress(console=console, transient=True, disable=console is None) as progress:
        task = progress.add_task("", total=len(listed) * len(checks))
        for name, kind, subject in listed:
            stopped: str | None = None
            for one in checks:
                progress.update(task, description=f"{name}: {one.name}")
                started = time.perf_counter()
                failure = one.failure(subject) if stopped is None else f"{_NOT_RUN}, because '{stopped}' failed"
                if failure is not None and one.first and stopped is None:
                    stopped = one.name
                seconds = round(time.perf_counter() - started, 3)
                report.results.append(Result(name, kind, one.name, failure is None, seconds, failure))
                progress.advance(task)
    return report
