"""Time to read a prompt and time per token, side by side in one run: transformers, ANEE, and other engines."""

from __future__ import annotations

import copy
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

from anee_core.deferral import DeferredStep
from anee_core.engine import Engine
from anee_core.errors import InputError
from anee_core.load import dtype_of, load
from anee_core.model import AdaptiveModel
from anee_core.native.step import NativeStep
from anee_core.peers import peers
from anee_core.pictures import new_figure
from anee_core.shapes import SHAPES, build
from anee_core.timed_step import TimedStep

DENSE = "ANEE dense, decode()"


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Args:
        model: a model source, hub id, folder or one of `SHAPES`, which get random weights.
        dtype: of the model.
        batch: sequences at once.
        context: tokens of each prompt.
        tokens: new tokens whose times are taken.
        repeats: how often each contender is run; they take turns.
        skipped: shares of the layers to skip, at random for each token.
        policies: further policy strings, each with a budget after an ``@`` if it takes one, as in ``rl@0.7``.
        compiled: whether transformers compiled with a static cache takes part, which takes minutes to compile.
        peers: whether other engines take part, where they are installed and the batch is 1.
        weights: quantisations of the layers' weights that take part too, dense and with the last share skipped.
        device: where it runs; other engines and quantised weights take part on the CPU alone.
    """

    model: str
    dtype: str = "bfloat16"
    batch: int = 1
    context: int = 128
    tokens: int = 24
    repeats: int = 5
    skipped: tuple[float, ...] = (0.25, 0.5, 0.58)
    policies: tuple[str, ...] = ()
    compiled: bool = False
    peers: bool = False
    weights: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on the CPU."""
        return self.device == "cpu"

    def __post_init__(self) -> None:
        if min(self.batch, self.context, self.repeats) < 1 or self.tokens < 2:
            raise InputError("batch, context and repeats are at least 1, tokens at least 2")
        if any(not 0 < share < 1 for share in self.skipped):
            raise InputError(f"shares of layers to skip lie in (0, 1); got {self.skipped}")
        if not self.on_cpu and (self.peers or self.weights):
            raise InputError(f"other engines and int8 or int4 weights are for the CPU; leave them out on {self.device}")


class Stopwatch:
    """A streamer that notes when tokens come: the prompt first, then one new token of each row at a time.

    Args:
        read: called when the prompt has been read, which is when the first new token comes.
    """

    def __init__(self, read: Callable[[], None] = lambda: None) -> None:
        self.marks: list[float] = []
        self._read = read

    def put(self, tokens: Tensor) -> None:
        """Note the time."""
        self.marks.append(time.perf_counter())
        if len(self.marks) == 2:
            self._read()

    def end(self) -> None:
        """Do nothing."""

    @property
    def prompt_seconds(self) -> float:
        """Seconds from the prompt to the first new token."""
        return self.marks[1] - self.marks[0]

    @property
    def token_seconds(self) -> float:
        """Median seconds between new tokens."""
        return statistics.median(b - a for a, b in zip(self.marks[1:], self.marks[2:], strict=False))


@dataclass
class Contender:
    """Something that generates: ``run`` takes token ids [B, T], a number of new tokens and a stopwatch."""

    name: str
    run: Callable[[Tensor, int, Stopwatch], Any]
    model: AdaptiveModel | None = None
    """What runs, if it is ours."""

    @property
    def layer_bytes(self) -> int:
        """Bytes of all layers' weights as they are stored, if it is ours."""
        return 0 if self.model is None else sum(work.weight_bytes for work in self.model.engine.costs.run)

    @property
    def ran(self) -> float:
        """Share of the layers that were run for new tokens."""
        if self.model is None or self.model.last_trace is None:
            return 1.0
        made = [step.ran for step in self.model.last_trace.steps if step.phase == "decode"]
        return float(torch.cat(made, dim=2).float().mean())

    def parts(self, prompt: Tensor, count: int) -> dict[str, float | None]:
        """Return the milliseconds per token after the prompt that `TimedStep` tells apart, and the rest, in a run of
        its own.
        """
        if self.model is None:
            return {}
        engine = self.model.engine
        timed = TimedStep(engine.step)
        self.model.engine = Engine(engine.adapter, engine.parts, engine.policy, step=timed, costs=engine.costs)
        watch = Stopwatch(timed.reset)
        self.run(prompt, count, watch)
        self.model.engine = engine
        each = 1000 / (count - 1)
        known = {name: None if seconds is None else seconds * each for name, seconds in timed.close().items()}
        told = sum(known[name] or 0.0 for name in ("layers", "policy", "head"))
        return {**known, "rest": (watch.marks[-1] - watch.marks[1]) * each - told}


def measure(options: BenchOptions, advance: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """Return what was measured: bandwidth of this machine, bytes of the model, and a record for each contender.

    ``advance`` is called with a contender's name before each of its runs, of which there is one more than repeats.
    """
    network, tokenizer = _open(options)
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


def contenders(options: BenchOptions, network: Any, tokenizer: Any = None) -> list[Contender]:
    """Return who takes part; transformers' ``generate`` comes first."""
    found = [Contender("transformers generate", lambda p, n, w: _generate(network, p, n, w))]
    if options.compiled:
        config = CompileConfig()
        config._compile_all_devices = True  # on a CPU it would run eagerly
        static: dict[str, Any] = {"cache_implementation": "static", "compile_config": config}
        found.append(Contender("transformers compiled", lambda p, n, w: _generate(network, p, n, w, **static)))
    dense = load(network, tokenizer=tokenizer)
    found.append(Contender("ANEE dense, generate()", lambda p, n, w: _generate(dense, p, n, w)))
    found.append(_lean(DENSE, dense))
    found.append(_lean("ANEE dense, own modules", load(network, tokenizer=tokenizer, fast=False)))
    for share in options.skipped:
        found.append(_lean(f"ANEE {share:.0%} skipped", load(network, _at_random(share), tokenizer=tokenizer)))
    if options.skipped and options.on_cpu:
        # The same decisions, each skipped layer's keys and values projected at once, or only when needed.
        share = options.skipped[-1]
        for name, defers in (("at once", False), ("deferred", True)):
            model = load(network, _at_random(share), tokenizer=tokenizer)
            step = NativeStep(model.adapter, model.parts)
            chosen = DeferredStep(step) if defers else step
            model.engine = Engine(model.adapter, model.parts, model.policy, step=chosen)
            found.append(_lean(f"ANEE {share:.0%} skipped, K/V {name}", model))
    for weights in options.weights:
        small = load(copy.deepcopy(network), tokenizer=tokenizer, weights=weights)
        found.append(_lean(f"ANEE dense, {weights}", small))
        for share in options.skipped[-1:]:
            model = load(small.model, _at_random(share), tokenizer=tokenizer)
            found.append(_lean(f"ANEE {share:.0%} skipped, {weights}", model))
    for text in options.policies:
        model = load(network, *policy_and_budget(text), tokenizer=tokenizer)
        found.append(_lean(f"ANEE {text}", model))
    return found


def policy_and_budget(text: str) -> tuple[str, float | None]:
    """Read POLICY or POLICY@BUDGET.

    Raises:
        InputError: what stands after the @ is no number.
    """
    name, _, budget = text.partition("@")
    try:
        return name, float(budget) if budget else None
    except ValueError as error:
        raise InputError(f"'{text}' names no budget: write a number after the @, as in rl@0.7") from error


def _at_random(share: float) -> str:
    return f"random:p={share},protect=0 0"


def read_bandwidth(device: str = "cpu", nbytes: int | None = None, repeats: int = 10) -> float:
    """Return how fast memory can be read, in GB/s: the best of some sums over a tensor of ``nbytes``, by default a
    large one.
    """
    nbytes = nbytes or 1 << (28 if device == "cpu" else 31)
    data = torch.ones(nbytes // 4, device=device)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        float(data.sum())
        best = min(best, time.perf_counter() - started)
    return nbytes / best / 1e9


def _open(options: BenchOptions) -> tuple[Any, Any]:
    if options.model in SHAPES:
        network = build(options.model, dtype_of(options.dtype) or torch.float32)
        return load(network, device=options.device).parts.model, None
    model = load(options.model, dtype=options.dtype, device=options.device)
    return model.parts.model, model.tokenizer


def _generate(model: Any, prompt: Tensor, count: int, watch: Stopwatch, **options: Any) -> None:
    mask = torch.ones_like(prompt)
    model.generate(
        prompt, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=watch,
        pad_token_id=0, **options,
    )  # fmt: skip


def _lean(name: str, model: AdaptiveModel) -> Contender:
    def run(prompt: Tensor, count: int, watch: Stopwatch) -> None:
        model.decode(prompt, max_new_tokens=count, eos_token_id=[], streamer=watch)

    return Contender(name, run, model)


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
    """Save a picture of ms per token against the share of layers skipped, a panel for each of the ``benches`` that
    `measure` returned, with a ``title`` in each. The ideal line is the dense time less what reading the skipped
    layers' weights would take at the bandwidth measured.

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
    figure.savefig(out, dpi=130)
