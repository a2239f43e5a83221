"""Bytes that the K/V cache has allocated while a long prompt is read and continued, for token policies side by side.

    python benchmarks/cache_over_time.py smollm2 --text valid.txt --policy dense --policy asa --policy "tova:keep=0.2"

The prompt is read in pieces of --chunk tokens; the bytes are those of all buffers after each piece and after each new
token, as the trace reports them, and the slots those that each layer holds in the end. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import anee
from anee_core.bench.records import ending
from anee_core.display import new_figure, save_figure
from anee_core.evaluation import text_blocks
from anee_core.files import write_whole
from anee_core.model import AdaptiveModel


def watch(model: AdaptiveModel, prompt: Tensor, tokens: int) -> dict:
    """Return bytes over time, and slots by layer at the end, of a prompt [1, T] and some tokens after it."""
    trace = model.decode(prompt, max_new_tokens=tokens, eos_token_id=None).trace
    read, mib = 0, []
    for step, layers in zip(trace.steps, trace.kv_bytes_by_step, strict=True):
        read += step.real.shape[1]
        mib.append((read, int(layers.sum()) / 2**20))
    return {
        "mib": mib,
        "most_mib": max(m for _, m in mib),
        "slots": trace.kept[:, 0].tolist(),
        "context_dropped": trace.context_dropped,
    }


def draw(found: dict[str, dict], title: str, path: Path) -> None:
    """Write the picture: bytes over time, and slots by layer."""
    figure = new_figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    for name, figures in found.items():
        left.plot(*zip(*[(0, 0.0), *figures["mib"]], strict=True), label=name, drawstyle="steps-post")
        right.plot(figures["slots"], marker=".", label=name)
    left.set(xlabel="tokens read", ylabel="MiB allocated for the cache", title=title)
    right.set(xlabel="layer", ylabel="slots held at the end", ylim=(0, None))
    right.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--policy", action="append", required=True, help="may be repeated")
    parser.add_argument("--length", type=int, default=1000, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=24, help="tokens after it")
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/cache_over_time"))
    chosen = parser.parse_args()
    found = {}
    model = anee.load(chosen.model, dtype=chosen.dtype)
    prompt = text_blocks(model, chosen.text, chosen.length, 1)
    for policy in track(chosen.policy, console=Console(stderr=True)):
        adaptive = anee.load(model.model, policy, tokenizer=model.tokenizer, prefill_chunk=chosen.chunk)
        found[policy] = watch(adaptive, prompt, chosen.tokens)
    table = Table(
        "policy", "context dropped", "most MiB after a piece", "MiB at the end", "slots at the end, least to most"
    )
    for name, figures in found.items():
        slots = sorted(figures["slots"])
        end = figures["mib"][-1][1]
        dropped, most = f"{figures['context_dropped']:.1%}", f"{figures['most_mib']:.1f}"
        table.add_row(name, dropped, most, f"{end:.1f}", f"{slots[0]} to {slots[-1]}")
    Console().print(table)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(chosen, key) for key in ("model", "length", "tokens", "chunk", "dtype")}
    write_whole(ending(chosen.out, ".json"), json.dumps({**settings, "policies": found}, indent=2) + "\n")
    draw(found, f"{chosen.model}, {chosen.length} + {chosen.tokens} tokens", ending(chosen.out, ".png"))


if __name__ == "__main__":
    main()
