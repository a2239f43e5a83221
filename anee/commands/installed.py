"""The command that lists what is installed."""

from __future__ import annotations

import json
import logging
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def plugins(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List what is installed: name, distribution, version and what each plugin provides."""
    from anee_core.plugins import Plugins

    logger = logging.getLogger("anee_core.plugins")
    before = logger.level
    logger.setLevel(logging.ERROR)  # the problems are listed below
    try:
        found = Plugins.discover()
    finally:
        logger.setLevel(before)
    if as_json:
        print(json.dumps([{**vars(info), "provides": dict(info.provides)} for info in found.infos]))
        return
    table = Table("plugin", "distribution", "version", "provides")
    for info in found.infos:
        lines = [f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in info.provides.items()]
        cells = (info.name, info.distribution, info.version, info.problem or "\n".join(lines))
        table.add_row(*(escape(cell) for cell in cells))
    Console().print(table)
    for problem in found.problems():
        print(problem, file=sys.stderr)
