"""Say whether two versions of ANEE compute the same: digests of the logits of every family under every policy.

    python benchmarks/same_figures.py --save before.json      # in the one version
    python benchmarks/same_figures.py --against before.json   # in the other: prints what differs, and fails if any does

It asks for what outsiders ask for only, so that a version with other insides can be compared. Digests are of bits: both
runs need one machine, one torch and one number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import anee
from anee_core.cache_policies import AsaWeights
from anee_core.controllers import GateWeights
from anee_core.files import write_whole
from anee_core.policy import ShortcutWeights

CONFIGS = Path(__file__).parents[1] / "tests" / "configs"
LAYERS, WIDTH, RANK = 6, 32, 4
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "static:skip=1 3": {},
    "static:exit=4": {},
    "static:protect=1 1": {"budget": 0.7},
    "random:p=0.5,exit=0.1,protect=0 0": {},
    "heuristic:protect=1 1,exit=0.3": {"budget": 0.7},
    "gate:{folder}": {"budget": 0.8},
    "gate:{folder}+shortcuts:{folder}": {"budget": 0.85, "hard": True},
    "window:sinks=1,recent=4": {},
    "h2o:keep=0.4,least=1": {},
    "tova:keep=5": {},
    "knorm:keep=0.4,least=1,recent=2": {},
    "snapkv:keep=0.4,least=1,every=4,window=2,pool=3": {},
    "random_tokens:keep=0.4,least=1": {},
    "asa:{folder}": {},
    "random:p=0.5,protect=0 0+tova:keep=0.4,least=1": {},
    "gate:{folder}+shortcuts:{folder}+asa:{folder}": {"budget": 0.8},
}
REAL = {
    "dense": {},
    "rl": {"budget": 0.7},
    "asa": {},
    "rl+asa": {"budget": 0.8},
    "static:skip=12 14 17+window:sinks=1,recent=8": {},
}


def main() -> None:
    """Save digests, or compare with saved ones."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", type=Path, help="file to write digests to")
    parser.add_argument("--against", type=Path, help="file with digests to compare with")
    parser.add_argument("--real", action="store_true", help="SmolLM2 too, in float32, bfloat16 and int8")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _write_weights(Path(folder))
        jobs = list(_tiny_jobs(folder))
        found = {}
        for name, model, arguments in track(jobs, "tiny models", console=Console(stderr=True)):
            found[name] = _figures(model, arguments)
        if options.real:
            found.update(_real_figures())
    if options.save is not None:
        write_whole(options.save, json.dumps(found, indent=1) + "\n")
    if options.against is not None:
        known = json.loads(options.against.read_text())
        differing = [
            f"{name}: {what}"
            for name in known
            for what in known[name]
            if found.get(name, {}).get(what) != known[name][what]
        ]
        print("\n".join(differing))
        print(f"{sum(map(len, known.values()))} figures, {len(differing)} of them differ")
        sys.exit(bool(differing))


def _tiny_jobs(folder: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    for path in sorted(CONFIGS.glob("*.json")):
        values = json.loads(path.read_text())
        config = CONFIG_MAPPING[values.pop("model_type")](**values)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and parameter.std() > 1e-4:
                    parameter.mul_(0.45 / parameter.shape[-1] ** 0.5 / parameter.std())
        for policy, options in POLICIES.items():
            for fast in (False, True):
                arguments = {"policy": policy.format(folder=folder), "fast": fast, **options}
                yield f"{path.stem}, {policy}, fast={fast}", model, arguments


def _write_weights(folder: Path) -> None:
    """Write a made-up gate, shortcuts and interaction weights for the tiny models."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ones = torch.ones(LAYERS)
    GateWeights(
        weight=draw(LAYERS, WIDTH) * WIDTH**-0.5, bias=0.1 * ones, mean=0.05 * ones, spread=ones,
        budgets=torch.tensor([0.3, 1.0]), shares=torch.stack((0.8 * ones, 0.1 * ones)),
    ).save(folder)  # fmt: skip
    down, up = 0.1 * draw(LAYERS, RANK, WIDTH), draw(LAYERS, WIDTH, RANK)
    ShortcutWeights(down, up, 0.1 * draw(LAYERS, WIDTH)).save(folder)
    query, key = 0.3 * draw(LAYERS, RANK, WIDTH), 0.3 * draw(LAYERS, RANK, WIDTH)
    AsaWeights(query, key, 0.1 * draw(LAYERS)).save(folder)


def _real_figures() -> dict[str, dict[str, Any]]:
    found = {}
    settings: list[dict[str, Any]] = [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "weights": "int8"},
    ]
    for setting in settings:
        for policy, options in REAL.items():
            name = "smollm2-asa" if policy == "asa" else "smollm2"
            found[f"{name}, {policy}, {setting}"] = _figures(name, {"policy": policy, **options, **setting})
    return found


@torch.no_grad()
def _figures(network: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return digests of what a model computes, and what it says it spent; or why it cannot be loaded so."""
    try:
        model = anee.load(network, **arguments)
    except anee.AneeError as error:
        return {"refused": str(error)}
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    found = {"forward": _digest(model(ids).logits), "ragged": _digest(model(ids, attention_mask=mask).logits)}
    cache = model.new_cache()
    steps = [model(ids[:, :5], past_key_values=cache).logits]
    steps += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(5, 11)]
    found["steps"] = _digest(torch.cat(steps, dim=1))
    result = model.decode(ids, mask, max_new_tokens=8)
    found["decode"] = result.new_tokens
    found["generate"] = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False).tolist()
    trace = result.trace
    found["trace"] = [trace.budget_spent, trace.flops, trace.weight_bytes, trace.kv_bytes, trace.kept.tolist()]
    return found


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    main()
