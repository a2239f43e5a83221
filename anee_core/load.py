"""`load`: from a name, a folder or a model to an `AdaptiveModel` under a policy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from anee_core.calibration import CalibrationOptions, calibrate, fingerprint
from anee_core.errors import AneeError, InputError, ModelError, suggestion
from anee_core.hookspecs import SourceRequest
from anee_core.interfaces import CachePolicy, Calibration, Controller, ModelAdapter
from anee_core.ledger import check_budget
from anee_core.model import AdaptiveModel, Prefill, causal_lm, check_prefill
from anee_core.plugins import Plugins
from anee_core.policy import Policy, make_policy
from anee_core.quantised import quantise

logger = logging.getLogger(__name__)

_FITTED = frozenset({"gate", "shortcuts"})
"""What can be fitted for any model, without training, when it is first used."""
_BIASED = frozenset({"bloom", "mpt"})
"""Families that tell tokens' places by ALiBi alone."""
_WHERE = {"revision", "token", "cache_dir", "subfolder", "trust_remote_code", "local_files_only", "force_download"}
"""Options that say where a model is, for its config and tokenizer as well as for its weights."""


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
    calibration: Calibration | CalibrationOptions | None = None,
    plugins: Plugins | None = None,
    **model_options: Any,
) -> AdaptiveModel:
    """Load a causal LM and run it under a policy.

    Args:
        model: the name of an installed model source (``anee plugins`` lists them), a hub id, a local folder, or a
            loaded transformers model, plain, quantised or wrapped by PEFT.
        policy: a policy string such as ``"static:skip=5 14"`` or ``"heuristic+window:recent=256"``, a folder with a
            saved policy, or a policy object. Default: dense.
        budget: share of the dense decoder-layer FLOPs that may be spent, in (0, 1], keys and values of skipped layers
            included. Default: the policy's own.
        hard: whether no token may exceed the budget; otherwise it holds on average.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype. Default: as stored.
        device: where to run, like ``"cpu"`` or ``"cuda:0"``. Default: where the model is. A loaded model is converted
            and moved in place.
        prefill: how ``generate`` reads prompts; see `AdaptiveModel`.
        prefill_chunk: tokens read at once under a policy that drops tokens; see `AdaptiveModel`.
        fast: whether decoding may use the native layer step where that is possible, see `anee_core.native.step`; its
            numbers agree with those of the model's own modules up to rounding.
        weights: ``"int8"`` or ``"int4"`` quantises the weights of the decoder layers, in place; see
            `anee_core.quantised`. Default: as they are.
        tokenizer: for a loaded model, or instead of the model's own.
        calibration: of this model, or how to calibrate it if the policy needs that.
        plugins: what is installed. Default: discovered now.
        model_options: passed to transformers' ``from_pretrained``; none for a loaded model.

    Raises:
        ModelError: the model cannot be found, loaded or run.
        PolicyError, BudgetError: the policy is unknown or does not fit the model.
    """
    plugins = plugins or Plugins.discover()
    # What needs no model is checked before a model is loaded.
    parsed = make_policy(policy, plugins)
    if budget is not None:
        check_budget(budget)
    check_prefill(prefill, prefill_chunk)
    if isinstance(calibration, CalibrationOptions):
        calibration.check()
    wanted_dtype = dtype_of(dtype)
    wanted_device = _device(device)
    if isinstance(model, nn.Module):
        if model_options:
            raise InputError(f"unknown option '{min(model_options)}': a loaded model is taken as it is")
        network = model
    else:
        network, found_tokenizer = _open(str(model), wanted_dtype, wanted_device, plugins, model_options)
        tokenizer = tokenizer if tokenizer is not None else found_tokenizer
    if isinstance(model, nn.Module) and (wanted_dtype or wanted_device):
        network = network.to(device=wanted_device, dtype=wanted_dtype)

    _check_wrapper(network)
    inner = causal_lm(network)
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(f"a model is a transformers causal LM; got {type(network).__name__}")
    adapter = _adapter_of(inner.config, plugins)
    _check_weights(inner)
    if weights is not None:
        quantise(adapter, inner, weights)
    parsed = parsed.with_trained(plugins.trained_for(getattr(inner.config, "anee_backbone", None)))
    adaptive = AdaptiveModel(network, adapter, tokenizer, prefill, prefill_chunk, fast)
    if not isinstance(model, nn.Module):
        adaptive.eval()
    if parsed.untrained() & _FITTED:
        # Fitting takes packages that a plain load does not.
        from anee_core.training.gate_calibration import fitted_for

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
    return adaptive.set_policy(parsed, budget, hard, ready)


def _open(
    name: str, dtype: torch.dtype | None, device: torch.device | None, plugins: Plugins, options: dict[str, Any]
) -> tuple[nn.Module, Any]:
    """Return model and tokenizer of a source, a folder or a hub id."""
    if name in plugins.model_sources:
        if options:
            raise InputError(f"the model source '{name}' takes no option '{min(options)}'")
        source = plugins.model_sources[name]
        try:
            network, tokenizer = source(SourceRequest(dtype, device))
        except AneeError:
            raise
        except Exception as error:
            raise ModelError(f"the model source '{name}' failed: {_first_line(error)}") from error
        return network, tokenizer
    if Path(name).exists() and not (Path(name) / options.get("subfolder", "") / "config.json").is_file():
        raise ModelError(f"'{name}' is no model folder: it has no config.json")
    where = {key: options[key] for key in _WHERE & options.keys()}
    try:
        config = AutoConfig.from_pretrained(name, **where)
    except Exception as error:  # each way for a config to be wrong raises its own kind
        if Path(name).is_dir():
            raise ModelError(f"the model in '{name}' cannot be read: {' '.join(str(error).split())}") from error
        known = f"model sources: {', '.join(sorted(plugins.model_sources)) or 'none installed'}"
        raise ModelError(
            f"cannot find the model '{name}': it is no local folder, no installed model source, and the hub did not "
            f"give it ({_first_line(error)}); {known}"
        ) from error
    _adapter_of(config, plugins)
    try:
        network, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or "auto", output_loading_info=True, **options
        )
    except Exception as error:  # safetensors, transformers and the hub each raise their own kinds
        raise ModelError(f"the model '{name}' cannot be loaded: {_first_line(error)}") from error
    if found["missing_keys"]:
        # transformers fills them with random numbers.
        raise ModelError(f"the checkpoint of '{name}' lacks the weight '{min(found['missing_keys'])}'; fetch it again")
    matrices = {key.removesuffix("weight") for key, _ in network.named_parameters() if key.endswith(".weight")}
    scaled = [
        key for key in found["unexpected_keys"] if key.endswith(".scale") and key.removesuffix("scale") in matrices
    ]
    if scaled:
        raise ModelError(f"the checkpoint of '{name}' is of quantised weights ('{min(scaled)}'); take the plain one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        if not tokenizer.vocab_size:  # what some families get from a folder without tokenizer files
            raise ValueError("its vocabulary is empty")
    except Exception as error:
        logger.warning("no tokenizer for '%s' (%s): generate from token ids, or pass one", name, _first_line(error))
        tokenizer = None
    return network if device is None else network.to(device), tokenizer


def _adapter_of(config: Any, plugins: Plugins) -> ModelAdapter:
    """Return the adapter of a model family, or raise `ModelError` saying why there is none."""
    kind = config.model_type
    if kind in plugins.adapters:
        return plugins.adapters[kind]
    if config.is_encoder_decoder:
        raise ModelError(f"'{kind}' has an encoder: ANEE runs decoder-only models")
    if kind in _BIASED:
        raise ModelError(
            f"'{kind}' places tokens by ALiBi, a bias that transformers makes as if every layer held every token, so "
            "it cannot follow a cache whose layers hold different tokens: ANEE cannot run this family"
        )
    network = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if network is not None and network._is_stateful:
        raise ModelError(
            f"layers of '{kind}' keep no key/value cache but a state of their own, which a skipped token would not "
            "enter: ANEE cannot run this family"
        )
    raise ModelError(
        f"no adapter for the model family '{kind}'; {suggestion(kind, plugins.adapters)}; "
        f"'anee new-adapter {kind}' writes the start of one"
    )


def dtype_of(given: str | torch.dtype | None) -> torch.dtype | None:
    """Return the floating-point dtype of a name, or raise `InputError`."""
    if isinstance(given, torch.dtype) and not given.is_floating_point:
        raise InputError(f"a model runs in a floating-point dtype; got {given}")
    if given is None or isinstance(given, torch.dtype):
        return given
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if given not in known:
        raise InputError(f"unknown dtype '{given}'; {suggestion(given, known)}")
    return known[given]


def _device(given: str | torch.device | None) -> torch.device | None:
    if given is None:
        return None
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except Exception as error:  # each backend that is absent says so in its own way
        raise InputError(f"device '{given}' cannot be used: {_first_line(error).split('. ')[0]}") from error
    return device


def _check_wrapper(model: nn.Module) -> None:
    """Raise `ModelError` for a PEFT model that is more than changed layers: what it adds in front would be lost."""
    configs = getattr(model, "peft_config", None)
    for name, config in configs.items() if isinstance(configs, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            raise ModelError(
                f"the PEFT adapter '{name}' adds virtual tokens ({config.peft_type}), which ANEE cannot run; "
                "adapters inside the layers, such as LoRA, work"
            )


def _check_weights(model: nn.Module) -> None:
    """Raise `ModelError` if a weight is not a number: everything downstream would be silently wrong."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or not parameter.is_floating_point() or type(parameter) is not nn.Parameter:
            continue
        # The sum is one pass without a temporary; only a suspicious one is looked at closely.
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)) and not torch.isfinite(parameter).all():
            raise ModelError(f"weight '{name}' holds NaN or infinity; the checkpoint is corrupt, fetch it again")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
