"""Decoding speed and K/V memory with a long context: dense against 80 % of the context dropped, same kernels.

    python benchmarks/kv_cache.py                                   # GPT-2 small and medium shapes, and SmolLM2
    python benchmarks/kv_cache.py --shape gpt2-small --batch 32 --steps 16 --json out.json

The cache is filled with random keys and values, each layer and row holding what a policy that drops the given share
would have left; then a few tokens are decoded. The dropping contender pays for all that adaptively sparse attention
does at each token (both projections, all interactions, eviction, compaction); only which tokens it keeps is drawn at
random, since the shapes have random weights. Repeats alternate between the contenders; medians are reported with the
spread (largest minus smallest over median).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import anee
from anee_core.cache import AdaptiveCache
from anee_core.cache_policies import AsaCachePolicy, AsaWeights
from anee_core.interfaces import CachePolicy, CacheView, Setting
from anee_core.model import AdaptiveModel

SHAPES = {"gpt2-small": (12, 768, 12), "gpt2-medium": (24, 1024, 16)}


@dataclass(frozen=True)
class DropShare(AsaCachePolicy):
    """Does the work of adaptively sparse attention, and drops a given share of the tokens before the newest ones."""

    name: ClassVar[str] = "drop_share"
    folder: str = "random"
    share: float = 0.8
    rank: int = 64
    _lot: Tensor | None = field(default=None, init=False, compare=False, repr=False)

    def bind(self, setting: Setting) -> CachePolicy:
        """Draw weights."""
        shape = (setting.num_layers, self.rank, setting.width)
        weights = AsaWeights(torch.randn(shape), torch.randn(shape), torch.zeros(setting.num_layers))
        bound = DropShare(self.folder, self.shift, self.share, self.rank)
        object.__setattr__(bound, "_weights", weights)
        object.__setattr__(bound, "_lot", torch.rand(setting.num_layers, 4096) >= self.share)
        return bound

    def drawn(self, layer_idx: int, positions: Tensor) -> Tensor:
        """Return which positions are kept, of the same shape."""
        assert self._lot is not None
        return self._lot[layer_idx][positions]

    def retain(self, view: CacheView) -> Tensor:
        """Score the slots, then keep by lot instead."""
        scored = super().retain(view)
        return (scored & False) | self.drawn(view.layer_idx, view.position_ids)[:, None]


def build(shape: str, dtype: torch.dtype) -> AdaptiveModel:
    """Return a model: SmolLM2, or a GPT-2 with random weights."""
    if shape not in SHAPES:
        return anee.load(shape, dtype=dtype)
    layers, width, heads = SHAPES[shape]
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=2048)
    return anee.load(GPT2LMHeadModel(config).eval(), dtype=dtype)


def filled(model: AdaptiveModel, batch: int, context: int) -> AdaptiveCache:
    """Return a cache that has seen ``context`` random tokens, dropped as the policy would have."""
    cache = model.new_cache(context + 64)
    config, adapter, policy = model.config, model.adapter, model.policy.cache_policy
    width = adapter.head_dim(config)
    heads = adapter.kv_width(config) // width
    positions = torch.arange(context).expand(batch, -1)
    cache.begin(positions, None)
    everything = torch.ones(batch, 1, context, dtype=torch.bool)
    for layer_idx in range(len(cache.layers)):
        keys = torch.randn(batch, heads, context, width, dtype=model.dtype)
        cache.write(layer_idx, keys, keys)
        if not policy.keeps_all:
            state = torch.randn(batch, context, config.hidden_size, dtype=model.dtype)
            view = CacheView(
                layer_idx, positions, everything[:, 0], positions, everything[:, 0], everything[:, 0], {}, state
            )
            cache.remember(layer_idx, policy.remember(view))
            kept = policy.drawn(layer_idx, positions).clone()
            kept[:, -1] = True
            cache.evict(layer_idx, kept[:, None])
    cache.commit()
    return cache


def decode(model: AdaptiveModel, cache: AdaptiveCache, batch: int, steps: int) -> float:
    """Return the seconds that decoding some tokens for every row takes."""
    token = torch.zeros(batch, 1, dtype=torch.long)
    with torch.inference_mode():
        model(token, past_key_values=cache, logits_to_keep=1)
        started = time.perf_counter()
        for _ in range(steps):
            token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - started


def measure(shape: str, batch: int, chosen: argparse.Namespace) -> list[dict]:
    """Time both contenders, alternating, and return one record each."""
    model = build(shape, getattr(torch, chosen.dtype))
    contenders = {
        "dense": anee.load(model.model),
        f"{chosen.share:.0%} dropped": anee.load(model.model, DropShare(share=chosen.share)),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    memory: dict[str, float] = {}
    for _ in track(range(chosen.repeats), description=f"{shape}, batch {batch}", console=Console(stderr=True)):
        for name, adaptive in contenders.items():
            cache = filled(adaptive, batch, chosen.context)
            times[name].append(decode(adaptive, cache, batch, chosen.steps) / chosen.steps)
            memory[name] = cache.nbytes() / 2**20
            del cache
    dense = statistics.median(times["dense"])
    records = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        records.append(
            {
                "shape": shape,
                "batch": batch,
                "contender": name,
                "tokens_per_second": batch / median,
                "ms_per_step": median * 1000,
                "spread": (max(seconds) - min(seconds)) / median,
                "speed_against_dense": dense / median,
                "kv_mib": memory[name],
            }
        )
    return records


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["gpt2-small", "gpt2-medium", "smollm2"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--share", type=float, default=0.8, help="share of the context dropped")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/kv_cache.json"))
    chosen = parser.parse_args()
    records: list[dict] = []
    for shape in chosen.shape:
        for batch in chosen.batch:
            records += measure(shape, batch, chosen)
            chosen.json.parent.mkdir(parents=True, exist_ok=True)
            facts = {"machine": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
            settings = {"context": chosen.context, "dtype": chosen.dtype, "steps": chosen.steps}
            chosen.json.write_text(json.dumps({**facts, **settings, "records": records}, indent=2) + "\n")
    table = Table("shape", "batch", "contender", "tokens/s", "ms/step", "spread", "against dense", "K/V MiB")
    for r in records:
        table.add_row(
            r["shape"],
            str(r["batch"]),
            r["contender"],
            f"{r['tokens_per_second']:.1f}",
            f"{r['ms_per_step']:.1f}",
            f"{r['spread']:.0%}",
            f"{r['speed_against_dense']:.2f}x",
            f"{r['kv_mib']:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
