"""The command that measures speed."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from anee.commands.flags import Flags, flat
from anee_core.bench.options import BenchOptions
from anee_core.files import writable, write_whole

_COLUMNS = (
    "contender", "ms/token", "spread", "speedup", "layers run", "against ideal", "of bandwidth", "prompt ms",
    "prompt speedup",
)  # fmt: skip
_PARTS = ("ms per token after the prompt", "layers", "of them attention", "policy", "head", "cache, Python")


@dataclass(frozen=True)
class Written:
    """Where the results go."""

    out: Path = Path("benchmarks/out/bench.json")
    """File that keeps what is measured; an interrupted run goes on."""
    plot: Path | None = None
    """Picture to write."""
    markdown: Path | None = None
    """File to write the tables to."""


_EACH = frozenset({"model", "dtype", "batch", "context"})
"""Fields of which each combination is measured."""


@flat
def bench(
    options: Annotated[BenchOptions, Flags(hide=_EACH, rename={"policies": "policy"}, short={"policies": "-p"})],
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Model sources, ids, folders or sizes: gpt2-small, -medium, -large, -xl, llama-1.1b."),
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="May be repeated. Default: bfloat16.")] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="May be repeated. Default: 1.")] = None,
    context: Annotated[
        list[int] | None, typer.Option("--context", help="Tokens of the prompt; may be repeated. Default: 128.")
    ] = None,
    *,
    written: Annotated[Written, Flags(rename={"out": "json"})],
) -> None:
    """Time ANEE against transformers, side by side: ms per token, and reading the prompt."""
    import torch  # heavy: imported where used
    import transformers

    from anee_core.bench.records import Records, processor
    from anee_core.bench.speed import draw, measure
    from anee_core.display import picture, progress_bar

    if written.markdown is not None:
        writable(written.markdown)
    if written.plot is not None:
        picture(written.plot)
    setting = {name: value for name, value in asdict(options).items() if name not in _EACH}
    records = Records(written.out, {**setting, "transformers": transformers.__version__})
    machine = f"{processor()}, {torch.get_num_threads()} threads"
    chosen = (
        models or [options.model],
        dtype or [options.dtype],
        batch or [options.batch],
        context or [options.context],
    )
    combinations = [
        replace(options, model=model, dtype=kind, batch=rows, context=length)
        for model, kind, rows, length in itertools.product(*chosen)
    ]
    for each in combinations:
        title = f"{each.model}, {each.dtype}, batch {each.batch}, context {each.context}"
        if title in records:
            continue
        with progress_bar(True, transient=True) as bar:
            task = bar.add_task(title, total=None)

            def advance(name: str, bar: Any = bar, task: Any = task, title: str = title) -> None:
                bar.update(task, advance=1, description=f"{title}: {name}")

            found = measure(each, advance)
        gpu = f"{torch.cuda.get_device_name(options.device)}, " if options.device.startswith("cuda") else ""
        records.add(title, {"title": title, "machine": gpu + machine, **found})
    console = Console(width=120)
    for found in records.all():
        for title, columns, lines in _tables(found):
            table = Table(*columns, title=title)
            for line in lines:
                table.add_row(*line)
            console.print(table)
    if written.markdown is not None:
        tables = [_written(*table) for found in records.all() for table in _tables(found)]
        write_whole(written.markdown, "\n".join(tables))
    if written.plot is not None:
        draw(records.all(), written.plot)


def _tables(found: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Return title, columns and rows of the tables that show one size of a model."""
    rows = [
        [
            r["contender"],
            f"{r['ms_per_token']:.1f}",
            f"{r['spread']:.0%}",
            f"{r['speedup']:.2f}x",
            f"{r['layers_run']:.0%}",
            f"{r['ms_per_token'] / r['ideal_ms']:.2f}x" if r["parts"] else "",
            f"{r['share_of_bandwidth']:.0%}",
            f"{r['prompt_ms']:.0f}",
            f"{r['prompt_speedup']:.2f}x",
        ]
        for r in found["records"]
    ]
    parts = [
        [r["contender"], *(_number(r["parts"].get(name)) for name in ("layers", "attention", "policy", "head", "rest"))]
        for r in found["records"]
        if r["parts"]
    ]
    title = f"{found['title']} (memory is read at {found['read_gb_per_s']:.1f} GB/s)"
    return [(title, _COLUMNS, rows), *([("", _PARTS, parts)] if parts else [])]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _written(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    heading = f"## {title}\n\n" if title else ""
    lines = [f"| {' | '.join(row)} |" for row in (columns, ("---",) * len(columns), *rows)]
    return heading + "\n".join(lines) + "\n"
