"""What the same prompt becomes under several policies, side by side.

    python benchmarks/side_by_side.py smollm2 --run dense --run rl@0.8 --run rl@0.6 --prompt "The sea was"

Greedy decoding. Writes OUT.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

import anee
from anee_core.bench.options import policy_and_budget
from anee_core.bench.records import ending
from anee_core.files import write_whole

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a fisherman who",
    "To boil an egg, first",
    "The main difference between plants and animals is that",
)


def cell(text: str) -> str:
    """Return a text on one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--run", action="append", required=True, help="POLICY or POLICY@BUDGET; may be repeated")
    parser.add_argument("--prompt", action="append", help=f"may be repeated. Default: {len(PROMPTS)} of our own")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/side_by_side"))
    chosen = parser.parse_args()
    model = anee.load(chosen.model, dtype=chosen.dtype)
    lines = [f"{chosen.model}, {chosen.dtype}, greedy, {chosen.tokens} tokens"]
    prompts = chosen.prompt or PROMPTS
    contenders = {run: anee.load(model.model, *policy_and_budget(run), tokenizer=model.tokenizer) for run in chosen.run}
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("texts", total=len(prompts) * len(contenders))
        for prompt in prompts:
            lines += ["", f"**{prompt}**", "", "| policy | spent | text |", "|---|---|---|"]
            for run, adaptive in contenders.items():
                result = adaptive.generate(prompt, max_new_tokens=chosen.tokens, do_sample=False)
                text = cell(result.text.removeprefix(prompt))
                lines.append(f"| {run} | {result.trace.budget_spent:.2f} | {text} |")
                bar.advance(task)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(ending(chosen.out, ".md"), "\n".join(lines) + "\n")
    Console().print("\n".join(lines), markup=False)


if __name__ == "__main__":
    main()
