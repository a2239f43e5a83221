"""Measure once per model how much each layer matters and how sure the model usually is."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anee_core.accounting.trace import Trace
from anee_core.calibration.options import CalibrationOptions
from anee_core.calibration.samples import own_samples, prompt_block, samples_of_file
from anee_core.controllers.static import StaticController
from anee_core.display import progress_bar
from anee_core.engine.engine import Engine
from anee_core.errors import InputError
from anee_core.evaluation.divergence import divergences
from anee_core.files import cache_folder, writable, write_whole
from anee_core.interfaces.setting import Calibration
from anee_core.policy.policy import Policy
from anee_core.ranges import check_kind

if TYPE_CHECKING:
    from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.calibration.fingerprint import fingerprint

logger = logging.getLogger(__name__)

_SCHEMA = 1
_QUANTILES = 101
_LENGTH = 96
_WARM_UP = 4
"""Positions left out of every average: their hidden states are outliers in norm."""


def calibrate(model: AdaptiveModel, options: CalibrationOptions | None = None) -> Calibration:
    """Return the model's calibration: from disk if it was done before, else measured now.

    The importance of a layer is the mean KL(dense || that layer skipped) over the calibration tokens, in nats. What
    has been measured is saved layer by layer, so an interrupted calibration goes on where it stopped.

    Raises:
        InputError: the text file is missing or too short, or the sizes do not fit the model.
    """
    options = options or CalibrationOptions()
    check_kind("options", options, CalibrationOptions, "CalibrationOptions, or None")
    limit = model.adapter.max_positions(model.config)
    length = options.length if options.length is not None else min(_LENGTH, limit or _LENGTH)
    if length <= _WARM_UP or (limit is not None and length > limit):
        raise InputError(
            f"calibration needs sequences of more than {_WARM_UP} tokens that fit the model's context ({limit}); "
            f"got a length of {length}"
        )
    model_print = fingerprint(model)
    store = _Store(options, length, model_print)
    engine = Engine(model.adapter, model.parts, Policy())
    layers = engine.costs.num_layers
    samples = length if store.tokens is None and options.text is None else 0
    with torch.no_grad(), _progress(options.progress, samples + 1 + layers - len(store.importance)) as advance:
        tokens = store.tokens
        if tokens is None:
            tokens = (
                samples_of_file(model, Path(str(options.text)), options.sequences, length)
                if options.text is not None
                else own_samples(model, engine, options.sequences, length, options.seed, advance)
            )
            store.keep_tokens(tokens)
        tokens = tokens.to(model.device)
        dense = _logits(model, engine, tokens)
        advance()
        for layer_idx in range(len(store.importance), layers):
            policy = Policy(StaticController(skip=(layer_idx,)))
            skipping = Engine(model.adapter, model.parts, policy, costs=engine.costs)
            rise = divergences(dense, _logits(model, skipping, tokens))
            store.add(float(rise[:, _WARM_UP:].mean()))
            advance()
    confidence = dense.softmax(-1).amax(-1)[:, _WARM_UP:].flatten()
    quantiles = torch.quantile(confidence, torch.linspace(0, 1, _QUANTILES, device=confidence.device)).cpu()
    return Calibration(torch.tensor(store.importance), quantiles, model_print, store.source)


def _logits(model: AdaptiveModel, engine: Engine, tokens: Tensor) -> Tensor:
    """Return next-token logits [B, T, V] in fp32."""
    trace, cache = Trace(), model.new_cache(tokens.shape[1])
    output = engine.run(prompt_block(model, tokens, 0), cache, trace)
    return engine.logits(output.hidden_states, trace).float()


class _Store:
    """A calibration on disk, complete or in progress."""

    def __init__(self, options: CalibrationOptions, length: int, model_print: str) -> None:
        self.source = "own samples" if options.text is None else f"text {_hash_file(Path(str(options.text)))}"
        wanted = {
            "schema": _SCHEMA, "model": model_print, "source": self.source,
            "sequences": options.sequences, "length": length, "seed": options.seed,
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
        self._path = Path(options.folder or cache_folder()) / f"calibration-{key}.json"
        self._data: dict[str, Any] = {**wanted, "tokens": None, "importance": []}
        try:
            found = json.loads(self._path.read_text())
            if {k: found[k] for k in wanted} != wanted or not all(isinstance(n, float) for n in found["importance"]):
                raise ValueError
            self._data = found
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            logger.warning("%s is unreadable; calibrating again", self._path)

    @property
    def importance(self) -> list[float]:
        return list(self._data["importance"])

    @property
    def tokens(self) -> Tensor | None:
        return None if self._data["tokens"] is None else torch.tensor(self._data["tokens"])

    def keep_tokens(self, tokens: Tensor) -> None:
        self._data["tokens"] = tokens.tolist()
        self._write()

    def add(self, importance: float) -> None:
        self._data["importance"].append(importance)
        self._write()

    def _write(self) -> None:
        try:
            write_whole(writable(self._path), json.dumps(self._data))
        except OSError as error:
            logger.warning("the calibration is not kept: %s", error)


def _hash_file(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InputError(f"cannot read the calibration text {path}: {error.strerror}") from error


@contextmanager
def _progress(show: bool, steps: int) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr where someone can see it; yield what advances it."""
    with progress_bar(show and steps > 1, transient=True) as bar:
        task = bar.add_task("calibrating layer importance", total=steps)
        yield lambda: bar.advance(task)
