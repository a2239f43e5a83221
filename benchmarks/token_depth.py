"""Which tokens a layer-skipping policy gives depth to: a picture of one text, and the depth of each kind of token.

    python benchmarks/token_depth.py smollm2 --policy rl --budget 0.7 --text valid.txt --out depth-smollm2

Blocks of text are read in the deployed regime. The picture shows which layers the last tokens of the first block ran;
the averages are over all blocks. Writes OUT.png and OUT.json.
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


def layers_run(model: AdaptiveModel, block: Tensor) -> Tensor:
    """Return which layers each token of a block [T] ran, [L, T]."""
    with torch.inference_mode():
        model(block[None], use_cache=False, logits_to_keep=1)
    trace = model.last_trace
    assert trace is not None
    return trace.ran[:, 0]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--policy", default="rl")
    parser.add_argument("--budget", type=float)
    parser.add_argument("--text", required=True)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--show", type=int, default=80, help="how many of the last tokens the picture has")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/token_depth"))
    chosen = parser.parse_args()
    if not 0 < chosen.show <= chosen.length:
        parser.error("--show lies within --length")
    model = anee.load(chosen.model, chosen.policy, chosen.budget, dtype=chosen.dtype)
    blocks = text_blocks(model, chosen.text, chosen.length, chosen.blocks)
    kinds = Kinds(model, blocks)
    ran = torch.stack([layers_run(model, b) for b in track(blocks, console=Console(stderr=True))])
    found = kinds.averages(ran.float().mean(1))
    what = "share of layers run"
    print_averages(found, what)
    title = f"{chosen.model}, {chosen.policy}: layers that tokens ran (grey), {ran.float().mean():.0%} of all"
    draw(ran[0, :, -chosen.show :], kinds.pieces[0][-chosen.show :], found, title, what, ending(chosen.out, ".png"))
    figures = {name: getattr(chosen, name) for name in ("model", "policy", "budget", "length", "blocks", "dtype")}
    figures |= {"ran": {kind: mean for kind, (mean, _) in found.items()}}
    figures |= {
        "tokens": {kind: count for kind, (_, count) in found.items()},
        "by_layer": ran.float().mean((0, 2)).tolist(),
    }
    write_whole(ending(chosen.out, ".json"), json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
