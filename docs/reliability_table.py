"""Writes the table in results/reliability.md from what the campaigns' last long run left behind."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from marked_table import write_table

ROOT = Path(__file__).parents[1]
RUN = ROOT / "build" / "campaigns"
RECORD = ROOT / "docs" / "results" / "reliability.json"
PAGE = RECORD.with_suffix(".md")


def record(run: Path) -> dict[str, Any]:
    """Return the figures of all campaigns in the folder of a run, and where it ran."""
    campaigns = sorted((json.loads(path.read_text()) for path in run.glob("*.json")), key=lambda found: found["what"])
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"versions": versions, "campaigns": campaigns}


def campaigns_table(found: dict[str, Any]) -> str:
    """Return the table of campaigns as Markdown."""
    lines = ["| campaign | trials | how they ended | faults | minutes |", "|---|---|---|---|---|"]
    for campaign in found["campaigns"]:
        outcomes = ", ".join(f"{count:,} {name}" for name, count in campaign["outcomes"].items())
        cells = campaign["what"], f"{campaign['trials']:,}", outcomes or "as they should", str(len(campaign["faults"]))
        lines.append(f"| {' | '.join(cells)} | {campaign['seconds'] / 60:.1f} |")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join([*lines, "", f"Run with {versions}."])


def main() -> None:
    """Rewrite the record and the page."""
    found = record(RUN)
    RECORD.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    write_table(PAGE, campaigns_table(found), "reliability_table.py")


if __name__ == "__main__":
    main()
