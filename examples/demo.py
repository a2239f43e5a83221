"""Continue a prompt densely and under a layer-skipping policy, and show what ran.

python examples/demo.py
python examples/demo.py --model FOLDER --policy heuristic --budget 0.7 --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging

import anee
from anee_core.generation import Generation

REPEATS = 3
PROMPT = "The Roman Empire was one of the largest empires in history."


def main() -> None:
    """Generate twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="model source, hub id or local folder")
    parser.add_argument("--policy", default="heuristic")
    parser.add_argument("--budget", type=float, default=0.85, help="share of the dense decoder-layer FLOPs")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    console = Console(highlight=False, width=100)

    console.print(f"loading {arguments.model} ...", style="dim")
    dense = anee.load(arguments.model, dtype=arguments.dtype)
    # The same weights under a policy. Calibrates on first use, with a progress bar.
    adaptive = anee.load(dense.model, arguments.policy, arguments.budget, tokenizer=dense.tokenizer)
    models = {"dense": dense, f"{arguments.policy}, budget {arguments.budget:g}": adaptive}
    options = {"max_new_tokens": arguments.max_new_tokens, "repetition_penalty": 1.3}
    results: dict[str, Generation] = {}
    for title, model in models.items():
        console.rule(title)
        streamer = TextStreamer(model.tokenizer, skip_special_tokens=True)
        results[title] = model.generate(arguments.prompt, streamer=streamer, **options)

    speeds: dict[str, list[float]] = {title: [] for title in models}
    for _ in track(range(REPEATS), description="timing, alternately", console=console, transient=True):
        for title, model in models.items():
            speeds[title].append(model.generate(arguments.prompt, **options).tokens_per_second)

    console.rule("which layers ran for which token")
    console.print(list(results.values())[-1].trace.draw(), markup=False)
    console.rule("what ran")
    console.print(compare(results, speeds))


def compare(results: dict[str, Generation], speeds: dict[str, list[float]]) -> Table:
    """Return one column per run. Shares are of the tokens under the policy: a prompt read densely is left out."""
    table = Table("", *results)
    traces = [result.trace for result in results.values()]
    giga = [{key: value / 1e9 for key, value in trace.flops.items()} for trace in traces]
    table.add_row("share of layers run per token", *(f"{trace.layers_run:.1%}" for trace in traces))
    table.add_row("decoder-layer FLOPs, of dense", *(f"{trace.budget_spent:.1%}" for trace in traces))
    table.add_row("GFLOPs spent, all parts", *(f"{g['spent']:.2f} of {g['dense']:.2f}" for g in giga))
    table.add_row("  of them K/V of skipped layers", *(f"{g['propagation']:.3f}" for g in giga))
    table.add_row("GFLOPs saved, all parts", *(f"{g['dense'] - g['spent']:.2f}" for g in giga))
    table.add_row(f"tokens/s, best of {REPEATS}", *(f"{max(found):.1f}" for found in speeds.values()))
    return table


if __name__ == "__main__":
    main()
