"""Scores on tasks under several policies, and how far each lies from the dense model's.

    python benchmarks/task_scores.py smollm2 --run rl@0.8 --run rl@0.6 --tasks-dir TASKS --tasks lambada_openai,piqa

All are scored on the same examples, in the regime that is deployed. An interrupted run goes on where it was. Writes
OUT.json and a table OUT.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

import anee
from anee.evaluation import run_tasks
from anee_core.bench import policy_and_budget
from anee_core.records import Records


def table(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table: a row for each policy, a column for each task."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    scores = {(record["run"], record["task"]): record for record in records}
    heads = [f"{task} ({scores['dense', task]['examples']})" for task in tasks]
    lines = [f"| policy | spent | {' | '.join(heads)} |", "|---" * (len(tasks) + 2) + "|"]
    for run in dict.fromkeys(record["run"] for record in records):
        mine = [scores[run, task] for task in tasks if (run, task) in scores]
        cells = [run, f"{sum(record['spent'] for record in mine) / len(mine):.3f}"]
        for record in mine:
            apart = f" ({100 * (record['score'] - scores['dense', record['task']]['score']):+.1f})"
            cells.append(f"{record['score']:.1%}{'' if run == 'dense' else apart}")
        lines.append(f"| {' | '.join(cells)} |")
    errors = (f"{task} {100 * scores['dense', task]['error']:.1f}" for task in tasks)
    return "\n".join([*lines, "", f"In brackets: points beside the dense model. Standard errors: {', '.join(errors)}."])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--run", action="append", default=[], help="POLICY or POLICY@BUDGET; may be repeated")
    parser.add_argument("--tasks", default="lambada_openai,piqa,winogrande")
    parser.add_argument("--tasks-dir", type=Path, help="folder with NAME.jsonl. Default: lm-eval's own tasks")
    parser.add_argument("--limit", type=int, help="examples per task")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/task_scores"))
    chosen = parser.parse_args()
    setting = {name: getattr(chosen, name) for name in ("model", "limit", "dtype")}
    records, console = Records(chosen.out.with_suffix(".json"), setting), Console(stderr=True)
    model = anee.load(chosen.model, dtype=chosen.dtype)
    for run in ("dense", *chosen.run):
        adaptive = anee.load(model.model, *policy_and_budget(run), tokenizer=model.tokenizer)
        for task in chosen.tasks.split(","):
            if f"{run} {task}" in records:
                continue
            found = run_tasks(
                adaptive, [task], tasks_dir=chosen.tasks_dir, limit=chosen.limit, batch=chosen.batch
            )["tasks"][task]  # fmt: skip
            record = {"run": run, "task": task, "score": found["scores"]["acc"], "error": found["errors"]["acc"]}
            record |= {"examples": found["examples"], "spent": found["spent"]["budget spent"]}
            records.add(f"{run} {task}", record)
            console.print(f"{run} {task}: {record['score']:.4f}, spent {record['spent']:.3f}")
    text = table(records.all())
    chosen.out.with_suffix(".md").write_text(text + "\n")
    Console().print(text, markup=False)


if __name__ == "__main__":
    main()
