"""How long it takes to read a prompt, by its length: the fast layer step beside the model's own modules.

    python benchmarks/prompts.py smollm2 --run dense --run rl@0.7 --dtype bfloat16

Random tokens; all take turns, and medians count. An interrupted run goes on where it was. Writes OUT.json and a table
OUT.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import anee
from anee_core.bench.options import policy_and_budget
from anee_core.bench.records import Records, ending
from anee_core.files import write_whole
from anee_core.model import AdaptiveModel


def seconds(model: AdaptiveModel, prompt: Tensor) -> float:
    """Return how long a model takes to read token ids [1, T]."""
    started = time.perf_counter()
    with torch.inference_mode():
        model(prompt, logits_to_keep=1)
    return time.perf_counter() - started


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--run", action="append", required=True, help="POLICY or POLICY@BUDGET; may be repeated")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 40, 64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/prompts"))
    chosen = parser.parse_args()
    setting = {name: getattr(chosen, name) for name in ("model", "repeats", "dtype")}
    records, model = Records(ending(chosen.out, ".json"), setting), anee.load(chosen.model, dtype=chosen.dtype)
    made = {
        (run, fast): anee.load(model.model, *policy_and_budget(run), tokenizer=model.tokenizer, fast=fast)
        for run in chosen.run
        for fast in (True, False)
    }
    lines = ["| tokens | policy | fast step, ms | modules, ms | faster |", "|---|---|---|---|---|"]
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=len(chosen.tokens) * (chosen.repeats + 1))
        for length in chosen.tokens:
            prompt = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
            took: dict[tuple[str, bool], list[float]] = {key: [] for key in made}
            wanted = [key for key in made if f"{key[0]} {length}" not in records]
            for _ in range(chosen.repeats + 1):
                for key in wanted:
                    took[key].append(seconds(made[key], prompt))
                bar.advance(task)
            for run in {run: None for run, _ in wanted}:
                fast, slow = (statistics.median(took[run, fast][1:]) * 1000 for fast in (True, False))  # one to warm up
                records.add(f"{run} {length}", {"run": run, "tokens": length, "fast_ms": fast, "modules_ms": slow})
    for r in records.all():
        times = f"{r['fast_ms']:.0f} | {r['modules_ms']:.0f} | {r['modules_ms'] / r['fast_ms']:.2f}x"
        lines.append(f"| {r['tokens']} | {r['run']} | {times} |")
    write_whole(ending(chosen.out, ".md"), "\n".join(lines) + "\n")
    Console().print("\n".join(lines), markup=False)


if __name__ == "__main__":
    main()
