"""Scores on tasks under several policies, and how far each lies from the dense model's.

    python benchmarks/task_scores.py smollm2 --run rl@0.8 --run rl@0.6 --tasks-dir TASKS --tasks lambada_openai,piqa
    python benchmarks/task_scores.py mini --contender rl --contender "best set" --calibration books.txt

All are scored on the same examples, in the regime that is deployed. An interrupted run goes on where it was. Writes
OUT.json, a table OUT.md and a plot OUT.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from contenders import NAMES, contenders
from rich.console import Console

import anee
from anee.lm_eval.options import TaskOptions
from anee.lm_eval.run_tasks import run_tasks
from anee_core.bench.options import policy_and_budget
from anee_core.bench.records import Records, ending
from anee_core.display import new_figure, save_figure
from anee_core.errors import BudgetError
from anee_core.files import write_whole
from anee_core.model import AdaptiveModel


def table(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table: a row for each policy and budget, a column for each task."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    names = list(dict.fromkeys(map(_name, records)))
    scores = {(record["run"], record["task"]): record for record in records}
    heads = [f"{task} ({scores['dense', task]['examples']})" for task in tasks]
    lines = [f"| policy | spent | {' | '.join(heads)} |", "|---" * (len(tasks) + 2) + "|"]
    ordered = sorted(records, key=lambda record: (names.index(_name(record)), -record["spent"]))
    for run in dict.fromkeys(record["run"] for record in ordered):
        mine = [scores[run, task] for task in tasks if (run, task) in scores]
        cells = [run, f"{sum(record['spent'] for record in mine) / len(mine):.3f}"]
        for record in mine:
            apart = f" ({100 * (record['score'] - scores['dense', record['task']]['score']):+.1f})"
            cells.append(f"{record['score']:.1%}{'' if run == 'dense' else apart}")
        lines.append(f"| {' | '.join(cells)} |")
    errors = (f"{task} {100 * scores['dense', task]['error']:.1f}" for task in tasks)
    return "\n".join([*lines, "", f"In brackets: points beside the dense model. Standard errors: {', '.join(errors)}."])


def draw(records: list[dict[str, Any]], out: Path) -> None:
    """Write a plot for each task: the score over what was spent, a line for each policy with its budgets."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    names = list(dict.fromkeys(_name(record) for record in records if record["run"] != "dense"))
    figure = new_figure(5 * len(tasks), 4.2)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        mine = [record for record in records if record["task"] == task]
        for i, name in enumerate(names):
            points = sorted((r["spent"], 100 * r["score"]) for r in mine if _name(r) == name)
            axes.plot([x for x, _ in points], [y for _, y in points], "o-", ms=3, color=f"C{i}", label=name)
        dense = next(100 * record["score"] for record in mine if record["run"] == "dense")
        axes.axhline(dense, color="black", linewidth=0.8, linestyle="--")
        axes.set(title=task, xlabel="share of dense layer FLOPs spent", ylabel="correct, %")
    axes.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, out)


def _name(record: dict[str, Any]) -> str:
    return str(record["run"].rsplit("@", 1)[0])


def models(model: AdaptiveModel, chosen: argparse.Namespace) -> dict[str, Callable[[], AdaptiveModel]]:
    """Return what makes the model of each run, by the run's name."""

    def named(run: str) -> AdaptiveModel:
        return anee.load(model.model, *policy_and_budget(run), tokenizer=model.tokenizer)

    found: dict[str, Callable[[], AdaptiveModel]] = {run: partial(named, run) for run in ("dense", *chosen.run)}
    make = contenders(model, chosen.calibration, chosen.budgets, length=chosen.length) if chosen.contender else {}
    for name in chosen.contender:
        found |= {f"{name}@{budget:g}": partial(make[name], budget) for budget in chosen.budgets}
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--run", action="append", default=[], help="POLICY or POLICY@BUDGET; may be repeated")
    parser.add_argument("--contender", action="append", default=[], choices=NAMES, help="at all budgets; repeatable")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9], help="of contenders")
    parser.add_argument("--calibration", help="text that contenders' layer sets and thresholds are found on")
    parser.add_argument("--length", type=int, default=512, help="tokens of its blocks")
    parser.add_argument("--tasks", default="lambada_openai,piqa,winogrande")
    parser.add_argument("--tasks-dir", type=Path, help="folder with NAME.jsonl. Default: lm-eval's own tasks")
    parser.add_argument("--limit", type=int, help="examples per task")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/task_scores"))
    chosen = parser.parse_args()
    if chosen.contender and not chosen.calibration:
        parser.error("contenders are fitted to a text: give --calibration FILE")
    setting = {name: getattr(chosen, name) for name in ("model", "limit", "dtype")}
    records, console = Records(ending(chosen.out, ".json"), setting), Console(stderr=True)
    model = anee.load(chosen.model, dtype=chosen.dtype)
    tasks = chosen.tasks.split(",")
    for run, make in models(model, chosen).items():
        if missing := [task for task in tasks if f"{run} {task}" not in records]:
            try:
                adaptive = make()
            except BudgetError as error:
                console.print(f"{run}: {error}")
                continue
        for task in missing:
            found = run_tasks(
                adaptive, [task], options=TaskOptions(chosen.tasks_dir, chosen.limit, batch=chosen.batch)
            )["tasks"][task]  # fmt: skip
            record = {"run": run, "task": task, "score": found["scores"]["acc"], "error": found["errors"]["acc"]}
            record |= {"examples": found["examples"], "spent": found["spent"]["budget spent"]}
            records.add(f"{run} {task}", record)
            console.print(f"{run} {task}: {record['score']:.4f}, spent {record['spent']:.3f}")
    text = table(records.all())
    write_whole(ending(chosen.out, ".md"), text + "\n")
    draw(records.all(), ending(chosen.out, ".png"))
    Console().print(text, markup=False)


if __name__ == "__main__":
    main()
