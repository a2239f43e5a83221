"""Quality against the budget for policies that skip layers, side by side with the literature's ways of doing so.

    python benchmarks/layer_skipping.py smollm2 --calibration wiki-valid.txt --text wikitext=wiki-test.txt
    python benchmarks/layer_skipping.py mini --calibration books.txt --text books=valid.txt --out skipping-mini

Each policy reads the same blocks as it would token by token (see the promise "parallel equals stepwise"). Thresholds
and layer sets come from the calibration text alone; what was spent is measured. An interrupted run goes on where it
was. Writes OUT.json, a table OUT.md and a plot OUT.png.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from contenders import contenders
from curves import write_curves
from rich.console import Console
from rich.progress import Progress

import anee
from anee_core.bench.records import Records, ending
from anee_core.errors import BudgetError
from anee_core.evaluation import dense_logits, text_blocks, text_quality

BUDGETS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
COLUMNS = {
    "budget": lambda record: f"{record['budget']:.2f}",
    "spent": lambda record: f"{record['spent']:.3f}",
    "pairs skipped": lambda record: f"{record['skipped']:.1%}",
    "KL to dense": lambda record: f"{record['divergence']:.3f}",
    "same top-1": lambda record: f"{record['agreement']:.1%}",
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text that thresholds and layer sets are found on")
    parser.add_argument("--text", action="append", required=True, help="NAME=FILE; may be repeated")
    parser.add_argument("--gate", help="folder with a gate and shortcuts. Default: the policy 'rl' of the model")
    parser.add_argument("--shortcuts", help="folder with shortcuts for the baselines. Default: those of the model")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--hard", action="store_true", help="no token exceeds the budget, under policies that take one")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--calibration-blocks", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="*", help="names of the policies to run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/layer_skipping"))
    chosen = parser.parse_args()
    model = anee.load(chosen.model, dtype=chosen.dtype)
    texts = dict(item.split("=", 1) for item in chosen.text)
    setting = {name: getattr(chosen, name) for name in ("model", "length", "blocks", "dtype", "gate", "shortcuts")}
    setting |= {"hard": True} if chosen.hard else {}
    records = Records(ending(chosen.out, ".json"), setting)
    make = contenders(
        model,
        chosen.calibration,
        chosen.budgets,
        length=chosen.length,
        blocks=chosen.calibration_blocks,
        gate=chosen.gate,
        shortcuts=chosen.shortcuts,
        hard=chosen.hard,
    )
    wanted = [(name, budget) for name in make if not chosen.only or name in chosen.only for budget in chosen.budgets]
    console = Console(stderr=True)
    with Progress(console=console) as bar:
        for text, path in texts.items():
            task = bar.add_task(text, total=len(wanted) + 1)
            blocks = text_blocks(model, path, chosen.length, chosen.blocks)
            dense = dense_logits(model, blocks)
            for name, budget in [("dense", 1.0), *wanted]:
                bar.advance(task)
                key = f"{text} {name} {budget}"
                if key in records:
                    continue
                try:
                    adaptive = model if name == "dense" else make[name](budget)
                except BudgetError as error:
                    console.print(f"{key}: {error}")
                    continue
                quality = text_quality(adaptive, blocks, dense=dense)
                console.print(f"{key}: perplexity {quality.perplexity:.2f}, spent {quality.spent:.3f}")
                records.add(key, {"text": text, "name": name, "budget": budget, **asdict(quality)})
            del dense
    heading = f"{chosen.model}: {chosen.blocks} blocks of {chosen.length} tokens, {chosen.dtype}"
    write_curves(records, chosen.out, heading, "spent", "share of dense layer FLOPs spent", COLUMNS)


if __name__ == "__main__":
    main()
