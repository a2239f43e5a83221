"""Commands that evaluate policies: with lm-eval, and side by side over budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from anee.commands.options import (
    Blocks,
    Budget,
    Device,
    Dtype,
    Length,
    MaxNewTokens,
    Model,
    PolicyString,
    Prompt,
    Sample,
    SampleSeed,
)
from anee.lm_eval.run_tasks import run_tasks
from anee_core.errors import InputError


def evaluate(
    model: Model,
    tasks: Annotated[str, typer.Option("--tasks", "-t", help="Names of lm-eval's tasks, or of local files.")],
    policy: PolicyString = "dense",
    budget: Budget = None,
    tasks_dir: Annotated[
        Path | None, typer.Option("--tasks-dir", help="Folder with NAME.jsonl, for tasks without a hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Examples per task.")] = None,
    mode: Annotated[str, typer.Option("--mode", help="parallel, or decode: token by token, an audit.")] = "parallel",
    batch: Annotated[int, typer.Option("--batch", help="Examples at once.")] = 1,
    dtype: Dtype = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
) -> None:
    """Evaluate a model under a policy with lm-eval: scores, and beside each what it took."""
    found = run_tasks(
        model, tasks.split(","), policy, budget, tasks_dir=tasks_dir, limit=limit, mode=mode, batch=batch, dtype=dtype,
        device=device,
    )  # fmt: skip
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
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=2) + "\n")


def sweep(
    models: Annotated[list[str], typer.Argument(help="Model sources, hub ids or local folders.")],
    policy: Annotated[
        list[str],
        typer.Option("--policy", "-p", help="May be repeated. '{budget}' in it is filled in: tova:keep={budget}"),
    ],
    text: Annotated[list[str], typer.Option("--text", "-t", help="NAME=FILE to measure on; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Writes OUT.json and OUT.png.")],
    budgets: Annotated[str, typer.Option("--budgets", "-b", help="Separated by commas.")] = "0.5,0.6,0.7,0.8,0.9",
    baselines: Annotated[bool, typer.Option("--baselines/--no-baselines", help="Add 'random' and a window.")] = True,
    length: Length = 512,
    blocks: Blocks = 4,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to decode for each time.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", help="Of each time; 0 for none.")] = 3,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure policies over budgets: quality against FLOPs, time and K/V bytes.

    A sweep that was interrupted goes on when the same command is given again.
    """
    from anee_core.bench.records import ending
    from anee_core.bench.sweep import HOLE, SweepOptions, draw, run_sweep

    try:
        asked = tuple(float(budget) for budget in budgets.split(","))
    except ValueError as error:
        raise InputError(f"budgets are numbers separated by commas; got '{budgets}'") from error
    policies = list(dict.fromkeys([*policy, *(("random", f"window:sinks=4,keep={HOLE}") if baselines else ())]))
    options = SweepOptions(asked, length, blocks, tokens, repeats, dtype, device)
    records = run_sweep(models, policies, _named_files(text), out, options)
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
    draw(records, ending(out, ".png"))


def report(
    model: Model,
    prompt: Prompt,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    policy: PolicyString = "dense",
    budget: Budget = None,
    max_new_tokens: MaxNewTokens = 60,
    sample: Sample = False,
    seed: SampleSeed = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Continue a prompt, and write a page that shows what ran, what was kept and what was spent."""
    from anee_core.evaluation import write_report
    from anee_core.load import load

    adaptive = load(model, policy, budget, dtype=dtype, device=device)
    result = adaptive.generate(prompt, max_new_tokens=max_new_tokens, do_sample=sample, seed=seed)
    # The last token was not fed in.
    ids = result.sequences[0, : result.trace.real.shape[1]]
    written = write_report(adaptive, ids, len(ids) + 1 - len(result.new_tokens[0]), out)
    Console(stderr=True).print(f"wrote {written}", soft_wrap=True)


def publish(
    model: Model,
    to: Annotated[str, typer.Option("--to", help="A folder, or with --push a repository OWNER/NAME on the hub.")],
    policy: PolicyString,
    budget: Budget = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="NAME=FILE to measure on, for the card; may be repeated.")
    ] = None,
    push: Annotated[bool, typer.Option("--push", help="Put it on the hub.")] = False,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    length: Length = 512,
    blocks: Blocks = 8,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Save a policy, with all its weights and a card of what it does on texts; 'anee.load(..., policy=TO)' takes it."""
    from tempfile import TemporaryDirectory

    from anee_core.evaluation import dense_logits, dense_perplexity, text_blocks, text_quality
    from anee_core.evaluation.card import Measured, save_with_card
    from anee_core.load import load
    from anee_core.policy import hub

    if push and not hub.is_repository(to):
        raise InputError(f"a repository on the hub is OWNER/NAME; got '{to}'")
    adaptive = load(model, policy, budget, dtype=dtype, device=device)
    measured = {}
    for name, path in _named_files(text or []).items():
        found = text_blocks(adaptive, path, length, blocks)
        dense = dense_logits(adaptive, found)
        quality = text_quality(adaptive, found, dense=dense)
        measured[name] = Measured(quality, dense_perplexity(dense, found), found.numel())
    with TemporaryDirectory() as draft:
        folder = save_with_card(adaptive, draft if push else to, measured, to)
        written = hub.push(folder, to, private or None) if push else str(folder)
    Console(stderr=True).print(f"wrote {written}", soft_wrap=True)


def _named_files(items: list[str]) -> dict[str, Path]:
    """Read NAME=FILE."""
    wrong = [item for item in items if "=" not in item]
    if wrong:
        raise InputError(f"a text is NAME=FILE; got '{wrong[0]}'")
    return {name: Path(path) for name, path in (item.split("=", 1) for item in items)}
