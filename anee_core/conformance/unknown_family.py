"""A family that nobody has adapted: found by looking, and run only if what was found passes checks."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from anee_core.adapter.guessed import GuessedAdapter, guess_layout
from anee_core.adapter.layout import Layout
from anee_core.conformance import dense, skipping
from anee_core.conformance.real_weights import check_real_weights
from anee_core.conformance.subject import Subject
from anee_core.conformance.tiny import small_like
from anee_core.errors import AdapterError, InputError, ModelError, OutputError
from anee_core.files import cache_folder, writable_folder, write_whole
from anee_core.plugins import Plugins

logger = logging.getLogger(__name__)

_SMALL_CHECKS = (
    dense.paths, dense.layer_arguments, dense.window, dense.layer_output, dense.dense_sequence, dense.dense_decode,
    dense.padding, skipping.keys_and_values, skipping.skip, skipping.leave, skipping.parallel, skipping.rows,
)  # fmt: skip
"""What a small model of the family has to pass."""


@dataclass(frozen=True)
class Verdict:
    """What was found of one config."""

    layout: dict[str, Any] | None
    """Fields of the layout; None if there is none."""
    why: str | None
    """Why the family cannot be run; None if it can."""
    weights: bool = False
    """Whether real weights of such a config have been checked too."""


def adapter_by_looking(config: Any, plugins: Plugins) -> GuessedAdapter:
    """Return an adapter for a family that has none, if a small model with such a config passes the checks with it.

    What was found is kept, for these versions of the family's code, of transformers, torch and ANEE.

    Raises:
        ModelError: it does not pass, with the line of the check that failed.
    """
    place, kind = _place(config), config.model_type
    verdict = _kept(place)
    if verdict is None:
        logger.warning("no adapter for the family '%s': looking at a small model of it, once (seconds)", kind)
        verdict = _look(config, plugins)
        _keep(place, verdict)
    if verdict.layout is None:
        raise ModelError(
            f"no adapter for the model family '{kind}', and as it looks it cannot be run: {verdict.why}; "
            f"'anee new-adapter {kind}' writes the start of an adapter"
        )
    return GuessedAdapter(Layout(**verdict.layout))


def check_weights_once(network: Any, adapter: GuessedAdapter) -> None:
    """Check real weights as `check_real_weights` does, unless some of such a config have passed before."""
    place = _place(network.config)
    verdict = _kept(place)
    if verdict is None or not verdict.weights:
        check_real_weights(network, adapter)
        _keep(place, Verdict(asdict(adapter.layout), None, weights=True))
    passed = len(_SMALL_CHECKS)
    logger.warning("the family '%s' runs as it looks, which passed %d checks", network.config.model_type, passed)


def _place(config: Any) -> Path:
    """Return where the verdict on a config is kept, for the code that it was found with."""
    network = AutoModelForCausalLM._model_mapping.get(type(config), None)
    module = None if network is None else inspect.getmodule(network)
    source = "" if module is None else inspect.getsource(module)
    versions = [transformers.__version__, torch.__version__, version("anee")]
    said = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "dtype")}
    told = json.dumps([source, versions, said], sort_keys=True, default=str)
    return cache_folder() / "families" / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"


def _kept(place: Path) -> Verdict | None:
    try:
        return Verdict(**json.loads(place.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _keep(place: Path, verdict: Verdict) -> None:
    try:
        writable_folder(place.parent)
        write_whole(place, json.dumps(asdict(verdict), indent=2) + "\n")
    except OutputError as error:
        logger.warning("%s; the family will be looked at again", error)


def _look(config: Any, plugins: Plugins) -> Verdict:
    """Look at small models with such a config, and check what is found."""
    try:
        small = small_like(config)
        layout = guess_layout(AutoModelForCausalLM.from_config(small))
        reason = GuessedAdapter(layout).refuse(config)
        if reason is not None:
            return Verdict(None, reason)
        subject = Subject(GuessedAdapter(layout), small, config.model_type, plugins=plugins)
    except (AdapterError, InputError) as error:
        return Verdict(None, str(error))
    except Exception as error:  # each family fails in its own way on sizes that it does not expect
        return Verdict(None, f"a small model of its kind cannot be made ({' '.join(str(error).split())})")
    for check in _SMALL_CHECKS:
        failure = check.failure(subject)
        if failure is not None:
            return Verdict(None, f"{check.name}: {failure}")
    return Verdict(asdict(layout), None)
