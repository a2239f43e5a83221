"""A table of a page that a script writes, between two marks that name the script."""

from __future__ import annotations

from pathlib import Path


def with_table(page: str, table: str, script: str) -> str:
    """Return a page with the table replaced that a script of this folder writes."""
    start, end = f"<!-- table written by docs/{script} -->", "<!-- end of the table -->"
    before, rest = page.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n\n{table}\n\n{end}{after}"


def write_table(page: Path, table: str, script: str) -> None:
    """Rewrite a page with its table replaced."""
    page.write_text(with_table(page.read_text(encoding="utf-8"), table, script), encoding="utf-8")
    print(f"wrote the table of {page}")
