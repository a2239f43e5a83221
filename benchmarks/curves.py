"""A table and a plot per text: perplexity against dense, over what a policy saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from anee_core.bench.records import Records, ending
from anee_core.display import new_figure, save_figure
from anee_core.files import write_whole


def write_curves(
    records: Records, out: Path, heading: str, x: str, label: str, columns: Mapping[str, Callable[[dict], str]]
) -> None:
    """Write OUT.md and OUT.png of records with ``text``, ``name``, ``perplexity`` and ``x``; one name is "dense".

    Args:
        records: one for each text and setting of a policy.
        out: path without its ending.
        heading: first line of the tables.
        x: name of the figure that says what was saved.
        label: of the x axis.
        columns: what tables say of a record, by title, between the policy's name and its perplexity.
    """
    found = records.all()
    texts = list(dict.fromkeys(r["text"] for r in found))
    # A name has one colour, also where some text lacks others.
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r["name"] for r in found if r["name"] != "dense"))}
    figure = new_figure(5.5 * len(texts), 4.2)
    lines = [heading, ""]
    for axes, text in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts, strict=True):
        mine = [r for r in found if r["text"] == text]
        dense = next(r["perplexity"] for r in mine if r["name"] == "dense")
        titles = ["policy", *columns, "perplexity", "against dense"]
        lines += [
            f"**{text}**: dense perplexity {dense:.2f}",
            "",
            f"| {' | '.join(titles)} |",
            "|---" * len(titles) + "|",
        ]
        for name, colour in colours.items():
            points = sorted((r for r in mine if r["name"] == name), key=lambda r: r[x])
            ratios = [r["perplexity"] / dense for r in points]
            axes.plot([r[x] for r in points], ratios, "o-", ms=3, color=colour, label=name)
            for r in points:
                cells = [name, *(cell(r) for cell in columns.values())]
                cells += [f"{r['perplexity']:.2f}", f"{r['perplexity'] / dense:.3f}x"]
                lines.append(f"| {' | '.join(cells)} |")
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set(title=text, xlabel=label, ylabel="perplexity against dense", ylim=(0.95, 2.5))
        lines.append("")
    axes.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, ending(out, ".png"))
    write_whole(ending(out, ".md"), "\n".join(lines) + "\n")
