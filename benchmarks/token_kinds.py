"""Kinds of tokens, and a picture of what happens to tokens, layer by layer and by kind."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from anee_core.display import new_figure, save_figure
from anee_core.model import AdaptiveModel

KINDS = (
    "first four", "line break", "punctuation", "number", "name or sentence start", "frequent word", "other word",
    "inside a word",
)  # fmt: skip
FREQUENT = 50


class Kinds:
    """The tokens of some blocks [N, T] as pieces of text, and what kind each is."""

    def __init__(self, model: AdaptiveModel, blocks: Tensor) -> None:
        self.pieces = [[model.tokenizer.decode([i]) for i in block] for block in blocks.tolist()]
        words = Counter(p.strip() for row in self.pieces for p in row if p.startswith(" ") and p.strip().islower())
        frequent = {word for word, _ in words.most_common(FREQUENT)}
        self.kinds = [[_kind_of(piece, i, frequent) for i, piece in enumerate(row)] for row in self.pieces]

    def averages(self, values: Tensor) -> dict[str, tuple[float, int]]:
        """Return the mean of values [N, t] of each block's first tokens by kind, and how many there were."""
        found: dict[str, list[float]] = {}
        for row, numbers in zip(self.kinds, values.tolist(), strict=True):
            for kind, number in zip(row, numbers, strict=False):
                found.setdefault(kind, []).append(number)
        return {kind: (sum(found[kind]) / len(found[kind]), len(found[kind])) for kind in KINDS if kind in found}


def _kind_of(piece: str, place: int, frequent: set[str]) -> str:
    """Return what kind of token a decoded piece of text is."""
    word = piece.strip()
    if place < 4:
        return "first four"
    if "\n" in piece:
        return "line break"
    if not any(c.isalnum() for c in word):
        return "punctuation"
    if any(c.isdigit() for c in word):
        return "number"
    if not piece.startswith(" "):
        return "inside a word"
    if word in frequent:
        return "frequent word"
    return "name or sentence start" if word[0].isupper() else "other word"


def print_averages(found: dict[str, tuple[float, int]], what: str) -> None:
    """Print a table of what `Kinds.averages` returned."""
    table = Table("kind of token", "tokens", what)
    for kind, (mean, count) in found.items():
        table.add_row(kind, str(count), f"{mean:.1%}")
    Console().print(table)


def draw(
    marked: Tensor, pieces: list[str], found: dict[str, tuple[float, int]], title: str, what: str, path: Path
) -> None:
    """Write the picture: which tokens [L, N] are marked at each layer, and the averages by kind."""
    layers, shown = marked.shape
    figure = new_figure(3 + 0.155 * shown, 2.2 + 0.13 * layers)
    left, right = figure.subplots(1, 2, width_ratios=(0.155 * shown, 2.6))
    left.imshow(marked.float().numpy(), aspect="auto", cmap="Greys", interpolation="nearest", vmin=0, vmax=1.3)
    left.set_xticks(range(shown), [repr(p)[1:-1].replace("$", r"\$") for p in pieces], rotation=90, fontsize=7)
    left.set(ylabel="layer", title=title)
    right.barh(list(found), [mean for mean, _ in found.values()], color="dimgrey")
    right.invert_yaxis()
    right.yaxis.tick_right()
    right.set(xlabel=what, xlim=(0, 1))
    figure.tight_layout()
    save_figure(figure, path)
