"""Many policies over many budgets, side by side: one JSON file, one picture of the trade-offs."""

from __future__ import annotations

import hashlib
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anee_core.bench.options import SweepOptions
from anee_core.bench.records import Records, ending
from anee_core.display import new_figure, progress_bar, save_figure
from anee_core.errors import BudgetError
from anee_core.evaluation.text_quality import dense_logits, text_blocks, text_quality
from anee_core.load import load
from anee_core.model.adaptive_model import AdaptiveModel

_AXES = (
    ("spent", "share of dense layer FLOPs"),
    ("time", "time per token against dense"),
    ("kv", "K/V bytes against dense"),
)
HOLE = "{budget}"
"""What stands for the budget in a policy string."""


@torch.inference_mode()
def run_sweep(
    models: list[str], policies: list[str], texts: dict[str, Path], out: Path, options: SweepOptions | None = None
) -> list[dict[str, Any]]:
    """Measure every policy at every budget on every text, and return the records, dense ones included.

    They are kept in ``out``.json one by one; what is there already is not measured again.

    Raises:
        AneeError: a model, policy or text cannot be had. A budget out of a policy's reach is left out with a notice.
    """
    options = options or SweepOptions()
    setting = {name: value for name, value in asdict(options).items() if name != "budgets"}
    records = Records(ending(out, ".json"), setting)
    cells = [("dense", 1.0), *((policy, budget) for policy in policies for budget in options.budgets)]
    with progress_bar(True) as bar:
        task = bar.add_task("sweep", total=len(models) * len(texts) * len(cells))
        for name in models:
            model = load(name, dtype=options.dtype, device=options.device)
            for text, path in texts.items():
                blocks = text_blocks(model, path, options.length, options.blocks)
                read = hashlib.sha256(blocks.numpy().tobytes()).hexdigest()[:8]
                dense = dense_logits(model, blocks)
                for policy, budget in cells:
                    bar.update(task, advance=1, description=f"{name}, {text}: {policy} at {budget:g}")
                    key = f"{name} {text} ({read}) {policy} {budget}"
                    if key in records:
                        continue
                    spelled = policy.replace(HOLE, f"{budget:g}")
                    wanted = None if HOLE in policy or policy == "dense" else budget
                    try:
                        adaptive = load(model.model, spelled, wanted, tokenizer=model.tokenizer)
                    except BudgetError as error:
                        bar.console.print(f"{key}: left out: {error}")
                        continue
                    quality = text_quality(adaptive, blocks, dense=dense)
                    times = _time(adaptive, model, blocks[:1, :16], options)
                    cell = {"model": name, "text": text, "policy": policy, "budget": budget}
                    records.add(key, {**cell, **asdict(quality), **times})
    return records.all()


def _time(model: AdaptiveModel, dense: AdaptiveModel, prompt: Tensor, options: SweepOptions) -> dict[str, float]:
    """Return milliseconds per decoded token, and their ratio to the dense model's; medians over alternating repeats."""
    if options.repeats == 0:
        return {}

    def seconds(one: AdaptiveModel) -> float:
        # The first new token belongs to the prompt's time.
        return one.decode(prompt, max_new_tokens=options.tokens + 1, eos_token_id=[]).decode_seconds / options.tokens

    seconds(model)
    pairs = [(seconds(model), seconds(dense)) for _ in range(options.repeats)]
    median = statistics.median(own for own, _ in pairs) * 1000
    return {"ms_per_token": median, "time": statistics.median(own / other for own, other in pairs)}


def draw(records: list[dict[str, Any]], out: Path) -> None:
    """Save a picture of perplexity against FLOPs, time and K/V bytes, a row for each model and text.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    groups = list(dict.fromkeys((r["model"], r["text"]) for r in records))
    figure = new_figure(5 * len(_AXES), 4 * len(groups))
    for row, (model, text) in zip(figure.subplots(len(groups), len(_AXES), squeeze=False), groups, strict=True):
        mine = relative([r for r in records if (r["model"], r["text"]) == (model, text)])
        for axes, (axis, label) in zip(row, _AXES, strict=True):
            for policy in dict.fromkeys(r["policy"] for r in mine if r["policy"] != "dense"):
                points = sorted((r for r in mine if r["policy"] == policy and axis in r), key=lambda r: r[axis])
                axes.plot([r[axis] for r in points], [r["quality"] for r in points], "o-", ms=3, label=policy)
            axes.plot([1], [1], "k*", label="dense")
            axes.set(title=f"{model}, {text}", xlabel=label, ylabel="perplexity against dense")
            axes.set_ylim(0.95, min(3.0, max(r["quality"] for r in mine) * 1.05))
    row[0].legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, out)


def relative(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of one model and text with figures relative to those of the dense model.

    ``quality`` is the perplexity, and ``kv`` the K/V bytes, as shares of the dense model's.
    """
    dense = next(r for r in records if r["policy"] == "dense")
    return [
        {**r, "quality": r["perplexity"] / dense["perplexity"], "kv": r["kv_bytes"] / dense["kv_bytes"]}
        for r in records
    ]
