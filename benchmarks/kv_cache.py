"""Decoding speed and K/V memory with a long context: dense against 80 % of the context dropped, same kernels.

    python benchmarks/kv_cache.py                                   # GPT-2 small and medium shapes, and SmolLM2
    python benchmarks/kv_cache.py --shape gpt2-small --batch 32 --steps 16 --json out.json

The cache is filled with random keys and values, each layer and row holding what a policy that drops the given share
would have left; then a few tokens are decoded. The dropping contender is adaptively sparse attention with random
weights, whose bias is such that about as many tokens go as come: it pays for both projections, all interactions,
eviction and compaction. Repeats alternate between the contenders; medians are reported with the spread (largest minus
smallest over median). "No context" is a dense step after one token: what is left of a step when attention costs
nothing. From it follows what dropping could give at most, if it cost nothing itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from baselines import hidden_states
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import anee
from anee_core.bench.records import processor
from anee_core.cache import AdaptiveCache
from anee_core.cache_policies import AsaCachePolicy, AsaWeights
from anee_core.files import write_whole
from anee_core.interfaces import CacheView
from anee_core.model import AdaptiveModel
from anee_core.policy import Policy

SHAPES = {"gpt2-small": (12, 768, 12), "gpt2-medium": (24, 1024, 16)}


def build(shape: str, dtype: torch.dtype) -> AdaptiveModel:
    """Return a model: SmolLM2, or a GPT-2 with random weights."""
    if shape not in SHAPES:
        return anee.load(shape, dtype=dtype)
    layers, width, heads = SHAPES[shape]
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=2048)
    return anee.load(GPT2LMHeadModel(config).eval(), dtype=dtype)


def attention_inputs(model: AdaptiveModel, count: int) -> list[Tensor]:
    """Return what each layer's attention gets of ``count`` random tokens, [count, D]."""
    tokens = torch.randint(3, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    states = hidden_states(model, tokens)
    return [model.adapter.attention_input(model.parts, i, state)[0] for i, state in enumerate(states[:-1])]


def dropping(model: AdaptiveModel, inputs: list[Tensor], left: int, rank: int = 64) -> Policy:
    """Return adaptively sparse attention under which, where ``left`` tokens are held, about one goes for each that
    comes.
    """
    layers, width = len(inputs), model.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(layers, rank, width, generator=generator) * width**-0.5 for _ in range(2))
    beta = []
    for q, k, x in zip(query, key, inputs, strict=True):
        scores = (x.float() @ q.T) @ (x.float() @ k.T).T * rank**-0.5
        beta.append(-scores.flatten().quantile(1 / left))
    return Policy(cache_policy=AsaCachePolicy.of(AsaWeights(query, key, torch.stack(beta))))


def filled(model: AdaptiveModel, inputs: list[Tensor], batch: int, context: int, share: float) -> AdaptiveCache:
    """Return a cache that has seen ``context`` random tokens, of which ``share`` were dropped if the policy drops."""
    cache = model.new_cache(context + 64)
    config, adapter, policy = model.config, model.adapter, model.policy.cache_policy
    width = adapter.head_dim(config)
    heads = adapter.kv_width(config) // width
    positions = torch.arange(context).expand(batch, -1)
    cache.begin(positions, None)
    real = torch.ones(batch, context, dtype=torch.bool)
    for layer_idx, states in enumerate(inputs):
        keys = torch.randn(batch, heads, context, width, dtype=model.dtype)
        cache.write(layer_idx, keys, keys)
        if policy.keeps_all:
            continue
        drawn = states[torch.randint(len(states), (batch, context))]
        view = CacheView(layer_idx, positions, real, positions, real, real, {}, drawn)
        cache.remember(layer_idx, policy.remember(view))
        kept = torch.rand(batch, 1, context) >= share
        kept[..., -1] = True
        cache.evict(layer_idx, kept)
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
    with torch.inference_mode():
        inputs = attention_inputs(model, 128)
    policy = dropping(model, inputs, max(int(chosen.context * (1 - chosen.share)), 2))
    dense, context = anee.load(model.model), chosen.context
    contenders = {
        "dense": (dense, context),
        f"{chosen.share:.0%} dropped": (anee.load(model.model, policy), context),
        "no context": (dense, 1),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    memory: dict[str, float] = {}
    for _ in track(range(chosen.repeats), description=f"{shape}, batch {batch}", console=Console(stderr=True)):
        for name, (adaptive, seen) in contenders.items():
            cache = filled(adaptive, inputs, batch, seen, chosen.share)
            times[name].append(decode(adaptive, cache, batch, chosen.steps) / chosen.steps)
            memory[name] = cache.nbytes() / 2**20
            del cache
    full, least = (statistics.median(times[name]) for name in ("dense", "no context"))
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
                "speed_against_dense": full / median,
                "at_most": full / (least + (1 - chosen.share) * (full - least)) if "dropped" in name else None,
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
            facts = {"machine": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
            settings = {"context": chosen.context, "dtype": chosen.dtype, "steps": chosen.steps}
            write_whole(chosen.json, json.dumps({**facts, **settings, "records": records}, indent=2) + "\n")
    table = Table("shape", "batch", "contender", "tokens/s", "ms/step", "spread", "against dense", "at most", "K/V MiB")
    for r in records:
        table.add_row(
            r["shape"],
            str(r["batch"]),
            r["contender"],
            f"{r['tokens_per_second']:.1f}",
            f"{r['ms_per_step']:.1f}",
            f"{r['spread']:.0%}",
            f"{r['speed_against_dense']:.2f}x",
            f"{r['at_most']:.2f}x" if r["at_most"] else "",
            f"{r['kv_mib']:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
