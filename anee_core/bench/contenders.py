"""Who takes part in a benchmark of speed: transformers and ANEE in several settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

from anee_core.bench.options import BenchOptions, policy_and_budget
from anee_core.bench.timing import Stopwatch, TimedStep
from anee_core.load import load
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.steps.deferred import DeferredStep
from anee_core.steps.native.step import NativeStep

DENSE = "ANEE dense, decode()"
"""Name of the contender against whose time skipping is measured."""


@dataclass
class Contender:
    """Something that generates, and whose speed is measured."""

    name: str
    """Name in tables and records."""
    run: Callable[[Tensor, int, Stopwatch], Any]
    """Function that generates, given token ids [B, T], a number of new tokens, and a stopwatch that sees each of them.
    """
    model: AdaptiveModel | None = None
    """The model that runs, if it is ANEE's; None for transformers and other engines."""

    @property
    def layer_bytes(self) -> int:
        """Bytes of all layers' weights as they are stored; 0 if the model is not ANEE's."""
        return 0 if self.model is None else sum(work.weight_bytes for work in self.model.engine.costs.run)

    @property
    def ran(self) -> float:
        """Share of the layers that ran for new tokens in the last generation."""
        if self.model is None or self.model.last_trace is None:
            return 1.0
        made = [step.ran for step in self.model.last_trace.steps if step.phase == "decode"]
        return float(torch.cat(made, dim=2).float().mean())

    def parts(self, prompt: Tensor, count: int) -> dict[str, float | None]:
        """Return the milliseconds per token after the prompt that each part takes, measured in a run of its own.

        The parts are those of `TimedStep`, and the rest; there are none if the model is not ANEE's.
        """
        if self.model is None:
            return {}
        step = self.model.engine.step
        timed = TimedStep(step)
        self.model.use_step(timed)
        watch = Stopwatch(timed.reset)
        self.run(prompt, count, watch)
        self.model.use_step(step)
        each = 1000 / (count - 1)
        known = {name: None if seconds is None else seconds * each for name, seconds in timed.close().items()}
        told = sum(known[name] or 0.0 for name in ("layers", "policy", "head"))
        return {**known, "rest": (watch.marks[-1] - watch.marks[1]) * each - told}


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
            model.use_step(DeferredStep(step) if defers else step)
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


def _at_random(share: float) -> str:
    return f"random:p={share},protect=0 0"


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
