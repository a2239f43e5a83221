"""Commands that evaluate policies: with lm-eval, and side by side over budgets."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from anee.commands.flags import Flags, flat
from anee.commands.options import Continuation, Loading, Model, NamedTexts, Prompt, UnderPolicy, named_files
from anee.lm_eval.options import TaskOptions
from anee.lm_eval.run_tasks import run_tasks
from anee_core.bench.options import SweepOptions
from anee_core.errors import InputError
from anee_core.files import writable, writable_folder, write_whole
from anee_core.ranges import Length, Size, check_numbers

_NAMED = Flags(short={"policy": "-p", "budget": "-b"}, defaults={"policy": MISSING})
"""Flags of commands that make no sense without a policy."""


@flat
def evaluate(
    model: Model,
    tasks: Annotated[str, typer.Option("--tasks", "-t", help="Names of lm-eval's tasks, or of local files.")],
    loading: Annotated[Loading, Flags(hide=frozenset({"dtype", "device"}), short={"policy": "-p", "budget": "-b"})],
    options: TaskOptions,
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
) -> None:
    """Evaluate a model under a policy with lm-eval: scores, and beside each what it took."""
    if out is not None:
        writable(out)
    found = run_tasks(model, tasks.split(","), loading.policy, loading.budget, options)
    scores = ("task", "metric", "score", "standard error", "examples")
    table = Table(*scores, "budget spent", "context kept", "MFLOPs/token", "weight MB/token", "K/V MB")
    for task_name, task in found["tasks"].items():
        spent = task["spent"]
        took = (f"{spent['budget spent']:.3f}", f"{spent['context kept']:.3f}")
        work = tuple(
            f"{spent[name] / 1e6:.{digits}f}" for name, digits in (("FLOPs", 1), ("weight bytes", 2), ("KV bytes", 2))
        )
        for metric, score in task["scores"].items():
            error = f"{task['errors'][metric]:.4f}" if metric in task["errors"] else ""
            table.add_row(task_name, metric, f"{score:.4f}", error, str(task["examples"]), *took, *work)
    Console().print(table)
    if out is not None:
        write_whole(out, json.dumps(found, indent=2) + "\n")


@dataclass(frozen=True)
class Compared:
    """What is compared."""

    budgets: str | None = None
    """Budgets separated by commas. Default: 0.5 to 0.9."""
    baselines: bool = True
    """Add 'random' and a window."""

    def numbers(self) -> tuple[float, ...]:
        """Return the budgets."""
        try:
            return tuple(float(budget) for budget in (self.budgets or "").split(","))
        except ValueError as error:
            raise InputError(f"budgets are numbers separated by commas; got '{self.budgets}'") from error


@flat
def sweep(
    models: Annotated[list[str], typer.Argument(help="Model sources, hub ids or local folders.")],
    policy: Annotated[
        list[str],
        typer.Option("--policy", "-p", help="May be repeated. '{budget}' in it is filled in: tova:keep={budget}"),
    ],
    text: NamedTexts,
    out: Annotated[Path, typer.Option("--out", "-o", help="Writes OUT.json and OUT.png.")],
    options: Annotated[SweepOptions, Flags(hide=frozenset({"budgets"}))],
    compared: Annotated[Compared, Flags(short={"budgets": "-b"})],
) -> None:
    """Measure policies over budgets: quality against FLOPs, time and K/V bytes.

    A sweep that was interrupted goes on when the same command is given again.
    """
    from anee_core.bench.records import ending
    from anee_core.bench.sweep import HOLE, draw, run_sweep
    from anee_core.display import picture

    if compared.budgets is not None:
        options = replace(options, budgets=compared.numbers())
    drawn = picture(ending(out, ".png"))
    policies = list(
        dict.fromkeys([*policy, *(("random", f"window:sinks=4,keep={HOLE}") if compared.baselines else ())])
    )
    records = run_sweep(models, policies, named_files(text), out, options)
    table = Table("model", "text", "policy", "budget", "spent", "dropped", "perplexity", "KL to dense", "ms/token")
    for r in records:
        numbers = (f"{r['spent']:.3f}", f"{r['dropped']:.1%}", f"{r['perplexity']:.2f}", f"{r['divergence']:.4f}")
        table.add_row(
            r["model"],
            r["text"],
            r["policy"],
            f"{r['budget']:g}",
            *numbers,
            f"{r['ms_per_token']:.1f}" if "ms_per_token" in r else "",
        )
    Console().print(table)
    draw(records, drawn)


@flat
def report(
    model: Model,
    prompt: Prompt,
    loading: UnderPolicy,
    continuation: Annotated[Continuation, Flags(short={"max_new_tokens": "-n"}, defaults={"max_new_tokens": 60})],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
) -> None:
    """Continue a prompt, and write a page that shows what ran, what was kept and what was spent."""
    from anee_core.evaluation.report import write_report

    writable(out)
    adaptive = loading.load(model)
    result = continuation.of(adaptive, prompt)
    # The last token was not fed in.
    ids = result.sequences[0, : result.trace.real.shape[1]]
    written = write_report(adaptive, ids, len(ids) + 1 - len(result.new_tokens[0]), out)
    Console(stderr=True).print(f"wrote {written}", soft_wrap=True)


@dataclass(frozen=True)
class Publishing:
    """What a card says, and where it goes."""

    push: bool = False
    """Put it on the hub."""
    private: bool = False
    """A new repository is private."""
    length: Length = 512
    """Tokens per block of text."""
    blocks: Size = 8
    """Blocks of each text."""

    def __post_init__(self) -> None:
        check_numbers(self)


@flat
def publish(
    model: Model,
    to: Annotated[str, typer.Option("--to", help="A folder, or with --push a repository OWNER/NAME on the hub.")],
    loading: Annotated[Loading, _NAMED],
    publishing: Publishing,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="NAME=FILE to measure on, for the card; may be repeated.")
    ] = None,
) -> None:
    """Save a policy, with all its weights and a card of what it does on texts; 'anee.load(..., policy=TO)' takes it."""
    from tempfile import TemporaryDirectory

    from anee_core.evaluation.card import Measured, save_with_card
    from anee_core.evaluation.text_quality import dense_logits, dense_perplexity, text_blocks, text_quality
    from anee_core.policy import hub

    push = publishing.push
    if push and not hub.is_repository(to):
        raise InputError(f"a repository on the hub is OWNER/NAME; got '{to}'")
    if not push:
        writable_folder(Path(to))
    adaptive = loading.load(model)
    measured = {}
    for name, path in named_files(text or []).items():
        found = text_blocks(adaptive, path, publishing.length, publishing.blocks)
        dense = dense_logits(adaptive, found)
        quality = text_quality(adaptive, found, dense=dense)
        measured[name] = Measured(quality, dense_perplexity(dense, found), found.numel())
    with TemporaryDirectory() as draft:
        folder = save_with_card(adaptive, draft if push else to, measured, to)
        written = hub.push(folder, to, publishing.private or None) if push else str(folder)
    Console(stderr=True).print(f"wrote {written}", soft_wrap=True)
