"""Writes the table of supported families in models.md from the reports of the conformance suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from marked_table import write_table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
REPORTS = [ROOT / "docs" / "results" / f"conformance-{which}.json" for which in ("oldest", "newest")]


def support_table(reports: list[dict[str, Any]]) -> str:
    """Return the table of families and checks as Markdown; a cell says in how many of the reports a check passed."""
    checks = list(dict.fromkeys(result["check"] for report in reports for result in report["results"]))
    subjects = list(dict.fromkeys(result["subject"] for report in reports for result in report["results"]))
    kinds = {result["subject"]: result["kind"] for report in reports for result in report["results"]}
    passed = {(i, r["subject"], r["check"]): r["passed"] for i, report in enumerate(reports) for r in report["results"]}
    lines = [
        f"| config | model type | {' | '.join(str(i) for i in range(1, len(checks) + 1))} |",
        f"|---|---|{'---|' * len(checks)}",
    ]
    for subject in subjects:
        cells = []
        for check in checks:
            found = [passed.get((i, subject, check)) for i in range(len(reports))]
            cells.append("✓" if all(found) else f"{sum(map(bool, found))}/{len(reports)}")
        lines.append(f"| {subject} | `{kinds[subject]}` | {' | '.join(cells)} |")
    versions = " and ".join(report["versions"]["transformers"] for report in reports)
    torch = " and ".join(dict.fromkeys(report["versions"]["torch"] for report in reports))
    names = "; ".join(f"{i} {name}" for i, name in enumerate(checks, 1))
    return "\n".join([*lines, "", f"✓: passed on transformers {versions} (torch {torch}). Checks: {names}."])


def main() -> None:
    """Rewrite the page."""
    write_table(PAGE, support_table([json.loads(path.read_text()) for path in REPORTS]), "support_table.py")


if __name__ == "__main__":
    main()
