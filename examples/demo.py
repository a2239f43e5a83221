"""Continue a prompt densely and under a layer-skipping policy, and show what ran.

python examples/demo.py
python examples/demo.py --model FOLDER --policy heuristic --budget 0.7 --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging

import anee
from anee_core.generation import Generation

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

    results: list[tuple[str, Generation]] = []
    for policy, budget in (("dense", None), (arguments.policy, arguments.budget)):
        title = policy if budget is None else f"{policy}, budget {budget:g}"
        console.rule(title)
        if not results:
            console.print(f"loading {arguments.model} ...", style="dim")
            model = anee.load(arguments.model, dtype=arguments.dtype)
            model.generate(arguments.prompt, max_new_tokens=4)  # warm up, so that neither run pays for first calls
        else:
            # The same weights, under another policy. Calibrates on first use.
            model = anee.load(model.model, policy=policy, budget=budget, tokenizer=model.tokenizer)
        streamer = TextStreamer(model.tokenizer, skip_special_tokens=True)
        result = model.generate(
            arguments.prompt, max_new_tokens=arguments.max_new_tokens, repetition_penalty=1.3, streamer=streamer
        )
        results.append((title, result))

    console.rule("which layers ran for which token")
    console.print(results[-1][1].trace.draw(), markup=False)
    console.rule("what ran")
    console.print(compare(results))


def compare(results: list[tuple[str, Generation]]) -> Table:
    """Return one column per run. FLOPs are of the tokens under the policy; a prompt read densely is left out."""
    table = Table("", *(title for title, _ in results))

    def row(name: str, *values: str) -> None:
        table.add_row(name, *values)

    traces = [result.trace for _, result in results]
    giga = [{key: value / 1e9 for key, value in trace.flops.items()} for trace in traces]
    row("share of layers run per token", *(f"{trace.layers_run:.1%}" for trace in traces))
    row("decoder-layer FLOPs, of dense", *(f"{trace.budget_spent:.1%}" for trace in traces))
    row("GFLOPs spent, all parts", *(f"{g['spent']:.2f} of {g['dense']:.2f}" for g in giga))
    row("  of them K/V of skipped layers", *(f"{g['propagation']:.3f}" for g in giga))
    row("GFLOPs saved, all parts", *(f"{g['dense'] - g['spent']:.2f}" for g in giga))
    row("tokens/s", *(f"{result.tokens_per_second:.1f}" for _, result in results))
    return table


if __name__ == "__main__":
    main()
