"""Which tokens a token policy keeps: a picture of one text, layer by layer, and the share kept of each kind of token.

    python benchmarks/kept_tokens.py smollm2 --policy asa --text valid.txt --out docs/results/kept-smollm2

Blocks of text are read to their end; what the cache holds then is shown for the newest tokens of the first block, and
averaged over all blocks and layers for tokens that are at least --back tokens old. Writes OUT.png and OUT.json.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import anee
from anee_core.evaluation import text_blocks
from anee_core.model import AdaptiveModel
from anee_core.pictures import new_figure

KINDS = (
    "first four", "line break", "punctuation", "number", "name or sentence start", "frequent word", "other word",
    "inside a word",
)  # fmt: skip
FREQUENT = 50


def held_at_the_end(model: AdaptiveModel, block: Tensor) -> Tensor:
    """Return what each layer holds once a block [T] is read, [L, T]."""
    with torch.inference_mode():
        cache = model(block[None], logits_to_keep=1).past_key_values
    held = torch.zeros(len(cache.slots), len(block), dtype=torch.bool)
    for layer_idx, slots in enumerate(cache.slots):
        held[layer_idx, slots.positions()[0][slots.valid()[0]]] = True
    return held


def kind_of(piece: str, place: int, frequent: set[str]) -> str:
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


def draw(held: Tensor, pieces: list[str], shares: dict[str, float], title: str, path: Path) -> None:
    """Write the picture: what is held [L, N] of N tokens, and the share kept by kind."""
    layers, shown = held.shape
    figure = new_figure(3 + 0.155 * shown, 2.2 + 0.13 * layers)
    left, right = figure.subplots(1, 2, width_ratios=(0.155 * shown, 2.6))
    left.imshow(held, aspect="auto", cmap="Greys", interpolation="nearest", vmin=0, vmax=1.3)
    left.set_xticks(range(shown), [repr(p)[1:-1].replace("$", r"\$") for p in pieces], rotation=90, fontsize=7)
    left.set(ylabel="layer", title=title)
    names = [name for name in KINDS if name in shares]
    right.barh(names, [shares[name] for name in names], color="dimgrey")
    right.invert_yaxis()
    right.yaxis.tick_right()
    right.set(xlabel="share kept", xlim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--policy", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--back", type=int, default=64, help="youngest age of the tokens that are counted")
    parser.add_argument("--show", type=int, default=80, help="how many of the newest tokens the picture has")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/kept_tokens"))
    chosen = parser.parse_args()
    if not 0 < chosen.show <= chosen.length or not 0 <= chosen.back < chosen.length:
        parser.error("--show and --back lie within --length")
    model = anee.load(chosen.model, chosen.policy, dtype=chosen.dtype)
    blocks = text_blocks(model, chosen.text, chosen.length, chosen.blocks)
    pieces = [[model.tokenizer.decode([i]) for i in block] for block in blocks.tolist()]
    words = Counter(p.strip() for block in pieces for p in block if p.startswith(" ") and p.strip().islower())
    frequent = {word for word, _ in words.most_common(FREQUENT)}
    kept: dict[str, list[float]] = {}
    first: Any = None
    for block, texts in track(list(zip(blocks, pieces, strict=True)), console=Console(stderr=True)):
        held = held_at_the_end(model, block)
        first = held if first is None else first
        for place in range(chosen.length - chosen.back):
            share = held[:, place].float().mean().item()
            kept.setdefault(kind_of(texts[place], place, frequent), []).append(share)
    shares = {kind: sum(kept[kind]) / len(kept[kind]) for kind in KINDS if kind in kept}
    table = Table("kind of token", "tokens", "share kept")
    for kind, share in shares.items():
        table.add_row(kind, str(len(kept[kind])), f"{share:.1%}")
    Console().print(table)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"model": chosen.model, "policy": chosen.policy, "length": chosen.length, "blocks": chosen.blocks}
    figures |= {"back": chosen.back, "kept": shares, "tokens": {kind: len(found) for kind, found in kept.items()}}
    chosen.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    title = f"{chosen.model}: what each layer still holds (grey) after {chosen.length} tokens"
    draw(first[:, -chosen.show :].float(), pieces[0][-chosen.show :], shares, title, chosen.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
