"""`load`: from a name, a folder or a model to an `AdaptiveModel` under a policy."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from anee_core.accounting.budget import check_budget
from anee_core.adapter.guessed import GuessedAdapter
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.calibration.fingerprint import fingerprint
from anee_core.calibration.importance import calibrate
from anee_core.calibration.options import CalibrationOptions
from anee_core.engine.bound import Terms
from anee_core.errors import InputError, ModelError
from anee_core.interfaces.cache_policy import CachePolicy
from anee_core.interfaces.controller import Controller
from anee_core.interfaces.setting import Calibration
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.model.checks import Prefill, causal_lm, check_prefill, check_tokenizer
from anee_core.model.opening import adapter_of, check_weights, check_wrapper, device_of, dtype_of, open_model
from anee_core.plugins import Plugins
from anee_core.policy.policy import Policy
from anee_core.policy.strings import make_policy
from anee_core.ranges import check_flags, check_kind
from anee_core.steps.quantised import quantise

logger = logging.getLogger(__name__)

_FITTED = frozenset({"gate", "shortcuts"})
"""What can be fitted for any model, without training, when it is first used."""


def load(
    model: str | Path | nn.Module,
    policy: str | Path | Policy | Controller | CachePolicy | None = None,
    budget: float | None = None,
    *,
    hard: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    prefill: Prefill = "auto",
    prefill_chunk: int = 256,
    fast: bool = True,
    weights: str | None = None,
    tokenizer: Any = None,
    adapter: ModelAdapter | Literal["auto"] | None = "auto",
    calibration: Calibration | CalibrationOptions | None = None,
    plugins: Plugins | None = None,
    **model_options: Any,
) -> AdaptiveModel:
    """Load a causal LM and run it under a policy.

    It takes many parameters because it is the one door: most are named, and seldom needed.

    Args:
        model: the name of an installed model source (``anee plugins`` lists them), a hub id, a local folder or GGUF
            file, or a loaded transformers model, plain, quantised or wrapped by PEFT.
        policy: a policy string such as ``"static:skip=5 14"`` or ``"heuristic+window:recent=256"``, a folder with a
            saved policy, or a policy object. Default: dense.
        budget: share of the dense decoder-layer FLOPs that may be spent, in (0, 1], keys and values of skipped layers
            included. Default: the policy's own.
        hard: whether no token may exceed the budget; otherwise it holds on average.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype. Default, and ``"auto"``: as stored.
        device: where to run, like ``"cpu"`` or ``"cuda:0"``. Default: where the model is. A loaded model is converted
            and moved in place.
        prefill: how ``generate`` reads prompts; see `AdaptiveModel`.
        prefill_chunk: tokens read at once under a policy that drops tokens; see `AdaptiveModel`.
        fast: whether decoding may use a faster layer step where that is possible, see `anee_core.steps.native.step`;
            its numbers agree with those of the model's own modules up to rounding.
        weights: ``"int8"`` or ``"int4"`` quantises the weights of the decoder layers, in place; see
            `anee_core.steps.quantised`. Default: as they are.
        tokenizer: for a loaded model, or instead of the model's own.
        adapter: the adapter of the model's family. ``"auto"``: the registered one; if there is none, what a small model
            of the family shows by looking at it, if that passes the checks. None: a registered one only.
        calibration: of this model, or how to calibrate it if the policy needs that.
        plugins: what is installed. Default: discovered now.
        model_options: passed to transformers' ``from_pretrained``, such as ``gguf_file``; none for a loaded model.

    Raises:
        ModelError: the model cannot be found, loaded or run.
        PolicyError, BudgetError: the policy is unknown or does not fit the model.
    """
    plugins = plugins or Plugins.discover()
    check_kind("plugins", plugins, Plugins, "what Plugins.discover() returns, or None")
    # What needs no model is checked before a model is loaded.
    parsed = make_policy(policy, plugins)
    if budget is not None:
        check_budget(budget)
    check_prefill(prefill, prefill_chunk)
    check_tokenizer(tokenizer)
    check_flags(hard=hard, fast=fast)
    find = _finder(adapter, plugins)
    if calibration is not None:
        kinds = Calibration, CalibrationOptions
        check_kind("calibration", calibration, kinds, "a Calibration, or CalibrationOptions")
    wanted_dtype = dtype_of(dtype)
    wanted_device = device_of(device)
    if isinstance(model, nn.Module):
        if model_options:
            raise InputError(f"unknown option '{min(model_options)}': a loaded model is taken as it is")
        network = model
    else:
        network, found_tokenizer = open_model(str(model), wanted_dtype, wanted_device, plugins, model_options, find)
        tokenizer = tokenizer if tokenizer is not None else found_tokenizer
    if isinstance(model, nn.Module) and (wanted_dtype or wanted_device):
        network = network.to(device=wanted_device, dtype=wanted_dtype)

    check_wrapper(network)
    inner = causal_lm(network)
    if isinstance(inner, AdaptiveModel):
        raise InputError(f"this model runs under '{inner.policy}' already: load the one it holds, model.model")
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(f"a model is a transformers causal LM; got {type(network).__name__}")
    found = find(inner.config)
    check_weights(inner)
    if isinstance(found, GuessedAdapter):
        from anee_core.conformance.unknown_family import check_weights_once

        check_weights_once(inner, found)
    if weights is not None:
        quantise(found, inner, weights)
    parsed = parsed.with_trained(plugins.trained_for(getattr(inner.config, "anee_backbone", None)))
    adaptive = AdaptiveModel(network, found, tokenizer, prefill, prefill_chunk, fast)
    if not isinstance(model, nn.Module):
        adaptive.eval()
        adaptive.name = os.path.basename(model) if os.path.exists(model) else str(model)
    if parsed.untrained() & _FITTED:
        # Fitting takes packages that a plain load does not.
        from anee_core.calibration.gate import fitted_for

        adaptive.check_budget(parsed, budget)
        text = calibration.text if isinstance(calibration, CalibrationOptions) else None
        parsed = parsed.with_trained(dict.fromkeys(_FITTED, fitted_for(adaptive, text)))
    ready = calibration if isinstance(calibration, Calibration) else parsed.calibration
    if ready is None and parsed.controller.needs_calibration:
        # A budget that cannot be met shows before the minutes that calibration may take.
        adaptive.check_budget(parsed, budget)
        logger.info("policy '%s' calibrates the model on first use", parsed)
        ready = calibrate(adaptive, calibration if isinstance(calibration, CalibrationOptions) else None)
    elif ready is not None and parsed.controller.needs_calibration and ready.fingerprint != fingerprint(adaptive):
        logger.warning("the calibration is of other weights or another dtype; calibrate this model for best results")
    return adaptive.bind(parsed, Terms(budget, hard, ready), adaptive.engine.costs)


def _finder(given: ModelAdapter | Literal["auto"] | None, plugins: Plugins) -> Callable[[Any], ModelAdapter]:
    """Return what finds the adapter for a config, or raises `ModelError` saying why there is none.

    Raises:
        InputError: what was given is no adapter.
    """
    if isinstance(given, ModelAdapter):
        return lambda config: given
    if given not in ("auto", None):
        raise InputError(f"adapter is 'auto', None or an adapter object; got {given!r}")

    def find(config: Any) -> ModelAdapter:
        known = adapter_of(config, plugins, required=given is None)
        if known is not None:
            return known
        # The checks are not needed where there is an adapter.
        from anee_core.conformance.unknown_family import adapter_by_looking

        return adapter_by_looking(config, plugins)

    return find
