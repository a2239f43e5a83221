"""Time to read a prompt and time per token, side by side in one run."""

from __future__ import annotations

import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from anee_core.bench.contenders import DENSE, Contender, contenders
from anee_core.bench.options import BenchOptions
from anee_core.bench.peers.engines import peers
from anee_core.bench.random_models import SIZES, build
from anee_core.bench.timing import Stopwatch, read_bandwidth
from anee_core.display import new_figure, save_figure
from anee_core.load import load
from anee_core.model.opening import dtype_of


def measure(options: BenchOptions, advance: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """Return what was measured: bandwidth of this machine, bytes of the model, and a record for each contender.

    ``advance`` is called with a contender's name before each of its runs, of which there is one more than repeats.
    """
    network, tokenizer = _open(options)
    load(network).check_fits(options.context + options.tokens - 1)
    others = contenders(options, network, tokenizer)
    generator = torch.Generator().manual_seed(0)
    shape = options.batch, options.context
    prompt = torch.randint(3, network.config.vocab_size, shape, generator=generator).to(options.device)
    watches: dict[str, list[Stopwatch]] = {}
    bandwidth = read_bandwidth(options.device)
    with tempfile.TemporaryDirectory() as folder:
        if options.peers and options.batch == 1:
            runs = peers(network, tokenizer, Path(folder), options.context + options.tokens)
            others += [Contender(name, run) for name, run in runs.items()]
        for repeat in range(options.repeats + 1):
            for other in others:
                advance(other.name)
                watch = Stopwatch()
                other.run(prompt, options.tokens, watch)
                if repeat:  # the first is to warm up
                    watches.setdefault(other.name, []).append(watch)
    costs = load(network).engine.costs
    layers = sum(work.weight_bytes for work in costs.run)
    read = [other.layer_bytes or layers for other in others]
    bandwidth = max(bandwidth, read_bandwidth(options.device))
    records = [_record(other, watches[other.name], watches[others[0].name]) for other in others]
    dense = next(r["ms_per_token"] for r in records if r["contender"] == DENSE)
    for other, record, stored in zip(others, records, read, strict=True):
        record["ideal_ms"] = dense - (1 - record["layers_run"]) * layers / bandwidth / 1e6
        # A GPU is not done with its work when a call returns, so there calls tell nothing.
        record["parts"] = other.parts(prompt, options.tokens) if options.on_cpu else {}
        record["share_of_bandwidth"] = (
            (costs.head.weight_bytes + record["layers_run"] * stored) / record["ms_per_token"] / 1e6 / bandwidth
        )
    facts = {"layer_bytes": layers, "head_bytes": costs.head.weight_bytes, "read_gb_per_s": bandwidth}
    return {**facts, "records": records}


def _open(options: BenchOptions) -> tuple[Any, Any]:
    if options.model in SIZES:
        network = build(options.model, dtype_of(options.dtype) or torch.float32)
        return load(network, device=options.device).parts.model, None
    model = load(options.model, dtype=options.dtype, device=options.device)
    return model.parts.model, model.tokenizer


def _record(other: Contender, watches: list[Stopwatch], first: list[Stopwatch]) -> dict[str, Any]:
    """Return medians, spread, and ratios to the first contender within the same repeat."""
    seconds = [watch.token_seconds for watch in watches]
    median = statistics.median(seconds)
    pairs = list(zip(first, watches, strict=True))
    return {
        "contender": other.name,
        "ms_per_token": median * 1000,
        "spread": (max(seconds) - min(seconds)) / median,
        "speedup": statistics.median(a.token_seconds / b.token_seconds for a, b in pairs),
        "prompt_ms": statistics.median(watch.prompt_seconds for watch in watches) * 1000,
        "prompt_speedup": statistics.median(a.prompt_seconds / b.prompt_seconds for a, b in pairs),
        "layers_run": other.ran,
    }


def draw(benches: list[dict[str, Any]], out: Path) -> None:
    """Save a picture of ms per token against the share of layers skipped, with a panel for each benchmark.

    ``benches`` are what `measure` returned, with a ``title`` in each. The ideal line is the dense time less what
    reading the skipped layers' weights would take at the bandwidth measured.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure = new_figure(4 * len(benches) + 2, 3.6)
    for axes, bench in zip(figure.subplots(1, len(benches), squeeze=False)[0], benches, strict=True):
        ours = [
            r
            for r in bench["records"]
            if r["contender"].startswith("ANEE") and not re.search("own|int", r["contender"])
        ]
        for record in ours:
            place = 1 - record["layers_run"], record["ms_per_token"]
            axes.plot(*place, "o", label=record["contender"])
        ideal = sorted((1 - r["layers_run"], r["ideal_ms"]) for r in ours)
        axes.plot(*zip(*ideal, strict=True), "k:", label="ideal")
        axes.axhline(bench["records"][0]["ms_per_token"], color="gray", lw=1, label="transformers")
        axes.set(title=bench["title"], xlabel="share of layers skipped", ylabel="ms per token", ylim=(0, None))
    figure.tight_layout()
    figure.subplots_adjust(right=1 - 1.9 / figure.get_figwidth())
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save_figure(figure, out)
