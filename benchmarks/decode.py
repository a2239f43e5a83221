"""Milliseconds per decoded token, side by side in one run: transformers' generate, ANEE dense, ANEE skipping at random.

    python benchmarks/decode.py                       # SmolLM2, bf16 and fp32
    python benchmarks/decode.py --model FOLDER --tokens 64 --repeats 5 --json out.json

Each repeat times all contenders one after another, so that a slow spell of the machine hits all; medians are reported,
with the spread (largest minus smallest over median), and ratios to transformers within the same repeat. A time is that
of N more tokens: one run of N + 1 new tokens minus one of 1, so reading the prompt is not in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

import anee
from anee_core.model import AdaptiveModel

PROMPT = "The history of the city begins with a small settlement on the banks of the river, where"


def contenders(model: AdaptiveModel, skipped: float) -> dict[str, Callable[[int], AdaptiveModel | None]]:
    """Return functions that decode a number of tokens greedily, by name."""
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    dense = anee.load(model.model, policy="dense", tokenizer=model.tokenizer)
    skipping = anee.load(model.model, policy=f"random:p={skipped},protect=0 0", tokenizer=model.tokenizer)

    def hf(count: int) -> None:
        mask = torch.ones_like(ids)
        model.model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, **options)

    def under_generate(count: int) -> AdaptiveModel:
        mask = torch.ones_like(ids)
        dense.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, **options)
        return dense

    def lean(adaptive: AdaptiveModel) -> Callable[[int], AdaptiveModel]:
        def run(count: int) -> AdaptiveModel:
            adaptive.decode(ids, max_new_tokens=count, eos_token_id=[])
            return adaptive

        return run

    return {
        "transformers generate": hf,
        "ANEE dense, generate": under_generate,
        "ANEE dense, lean loop": lean(dense),
        f"ANEE, {skipped:.0%} skipped at random": lean(skipping),
    }


def measure(
    runs: dict[str, Callable[[int], AdaptiveModel | None]], tokens: int, repeats: int, title: str
) -> list[dict]:
    """Time all contenders, alternating, and return one record each."""
    for run in runs.values():
        run(4)
    times: dict[str, list[float]] = {name: [] for name in runs}
    ran: dict[str, float] = {}
    for _ in track(range(repeats), description=title, console=Console(stderr=True), transient=True):
        for name, run in runs.items():
            marks = [time.perf_counter()]
            for count in (1, tokens + 1):
                outcome = run(count)
                marks.append(time.perf_counter())
            times[name].append((marks[2] - 2 * marks[1] + marks[0]) / tokens * 1000)
            if outcome is not None and outcome.last_trace is not None:
                ran[name] = outcome.last_trace.layers_run
    first = next(iter(runs))
    return [
        {
            "contender": name,
            "ms_per_token": statistics.median(values),
            "spread": (max(values) - min(values)) / statistics.median(values),
            "ratio_to_transformers": statistics.median(a / b for a, b in zip(values, times[first], strict=True)),
            "layers_run": ran.get(name, 1.0),
            "all_ms": values,
        }
        for name, values in times.items()
    ]


def main() -> None:
    """Measure, print tables, save JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="model source, hub id or folder")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--skipped", type=float, default=0.58, help="share of layers skipped per token")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", default="benchmarks/out/decode.json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {
        "model": arguments.model,
        "tokens": arguments.tokens,
        "repeats": arguments.repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "results": {},
    }
    for dtype in arguments.dtypes:
        model = anee.load(arguments.model, dtype=dtype)
        records = measure(contenders(model, arguments.skipped), arguments.tokens, arguments.repeats, dtype)
        report["results"][dtype] = records
        table = Table("", "ms/token", "spread", "of transformers", "layers run", title=f"{arguments.model}, {dtype}")
        for r in records:
            table.add_row(
                r["contender"],
                f"{r['ms_per_token']:.1f}",
                f"{r['spread']:.0%}",
                f"{r['ratio_to_transformers']:.2f}",
                f"{r['layers_run']:.0%}",
            )
        Console(width=100).print(table)
    path = Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
