"""What skipping layers saves and costs, beside the dense model and int8 weights: speed, quality, and which layers ran.

python examples/demo.py
python examples/demo.py --model FOLDER --policy heuristic --budget 0.7 --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging as transformers_logging

import anee
from anee_core.evaluation import TextQuality, text_blocks, text_quality
from anee_core.generation import Generation

REPEATS = 3
PROMPT = "The Roman Empire was one of the largest empires in history."
PARAGRAPH = Path(__file__).with_name("lighthouse.txt")
"""What perplexity is measured on: nothing was trained on it."""
TOKENS = 256
SHOWN = 12
"""Tokens in the picture."""


def main() -> None:
    """Load one model in several ways, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="model source, hub id or local folder")
    parser.add_argument("--policy", default="rl")
    parser.add_argument("--budget", type=float, default=0.7, help="share of the dense decoder-layer FLOPs")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    console = Console(highlight=False, width=110)

    console.print(f"loading {arguments.model} ...", style="dim")
    models = loaded(arguments)
    blocks = text_blocks(models["dense"], PARAGRAPH, min(TOKENS, context_of(models["dense"])), 1)
    options = {"max_new_tokens": arguments.max_new_tokens, "repetition_penalty": 1.3}
    results: dict[str, Generation] = {}
    for title, model in models.items():
        results[title] = model.generate(arguments.prompt, **options)
        console.rule(title)
        console.print(results[title].text, markup=False)
    quality = {title: text_quality(model, blocks) for title, model in models.items()}
    speeds: dict[str, list[float]] = {title: [] for title in models}
    for _ in track(range(REPEATS), description="timing, taking turns", console=console, transient=True):
        for title, model in models.items():
            speeds[title].append(model.generate(arguments.prompt, **options).tokens_per_second)

    policy = list(models)[1]
    console.rule(f"{policy}: layers that ran for the last {SHOWN} tokens")
    console.print(results[policy].trace.draw(last=SHOWN), markup=False)
    console.print(compare(results, quality, speeds))


def loaded(arguments: argparse.Namespace) -> dict[str, anee.AdaptiveModel]:
    """Return the same weights dense and under the policy, and both again with int8 weights."""
    dense = anee.load(arguments.model, dtype=arguments.dtype)
    small = anee.load(copy.deepcopy(dense.model), tokenizer=dense.tokenizer, weights="int8")
    title = f"{arguments.policy} at {arguments.budget:g}"
    policy = {"policy": arguments.policy, "budget": arguments.budget, "tokenizer": dense.tokenizer}
    # Calibrates on first use, with a progress bar, if the policy needs that.
    return {
        "dense": dense,
        title: anee.load(dense.model, **policy),
        "dense, int8": small,
        f"{title}, int8": anee.load(small.model, **policy),
    }


def context_of(model: anee.AdaptiveModel) -> int:
    """Return how many tokens the model can read."""
    return model.adapter.max_positions(model.config) or TOKENS


def compare(results: dict[str, Generation], quality: dict[str, TextQuality], speeds: dict[str, list[float]]) -> Table:
    """Return one column per run. Shares are of the tokens under the policy: a prompt read densely is left out."""
    table = Table("", *results)
    traces = [result.trace for result in results.values()]
    fastest = {title: max(found) for title, found in speeds.items()}
    first = next(iter(fastest.values()))
    weights = [trace.weight_bytes["spent"] / int(trace.real.sum()) / 1e6 for trace in traces]
    table.add_row(
        f"tokens/s, best of {REPEATS}", *(f"{found:.1f} ({found / first:.2f}x)" for found in fastest.values())
    )
    table.add_row(f"perplexity of {PARAGRAPH.name}", *(f"{found.perplexity:.2f}" for found in quality.values()))
    table.add_row("layers run per token", *(f"{trace.layers_run:.1%}" for trace in traces))
    table.add_row("decoder-layer FLOPs, of dense", *(f"{trace.budget_spent:.1%}" for trace in traces))
    table.add_row("MB of weights read per token", *(f"{megabytes:.0f}" for megabytes in weights))
    table.add_row("K/V cache, MB", *(f"{trace.kv_bytes / 1e6:.2f}" for trace in traces))
    return table


if __name__ == "__main__":
    main()
