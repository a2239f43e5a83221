"""Which tokens a token policy keeps: a picture of one text, layer by layer, and the share kept of each kind of token.

    python benchmarks/kept_tokens.py smollm2 --policy asa --text valid.txt --out docs/results/kept-smollm2

Blocks of text are read to their end; what the cache holds then is shown for the newest tokens of the first block, and
averaged over all blocks and layers for tokens that are at least --back tokens old. Writes OUT.png and OUT.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from token_kinds import Kinds, draw, print_averages
from torch import Tensor

import anee
from anee_core.bench.records import ending
from anee_core.evaluation import text_blocks
from anee_core.files import write_whole
from anee_core.model import AdaptiveModel


def held_at_the_end(model: AdaptiveModel, block: Tensor) -> Tensor:
    """Return what each layer holds once a block [T] is read, [L, T]."""
    with torch.inference_mode():
        cache = model(block[None], logits_to_keep=1).past_key_values
    held = torch.zeros(len(cache.slots), len(block), dtype=torch.bool)
    for layer_idx, slots in enumerate(cache.slots):
        held[layer_idx, slots.positions()[0][slots.valid()[0]]] = True
    return held


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
    kinds = Kinds(model, blocks)
    held = torch.stack([held_at_the_end(model, b) for b in track(blocks, console=Console(stderr=True))])
    found = kinds.averages(held[:, :, : chosen.length - chosen.back].float().mean(1))
    print_averages(found, "share kept")
    title = f"{chosen.model}: what each layer still holds (grey) after {chosen.length} tokens"
    shown = slice(chosen.length - chosen.show, None)
    draw(held[0, :, shown], kinds.pieces[0][shown], found, title, "share kept", ending(chosen.out, ".png"))
    figures = {"model": chosen.model, "policy": chosen.policy, "length": chosen.length, "blocks": chosen.blocks}
    figures |= {"back": chosen.back, "kept": {kind: mean for kind, (mean, _) in found.items()}}
    figures |= {"tokens": {kind: count for kind, (_, count) in found.items()}}
    write_whole(ending(chosen.out, ".json"), json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
