"""From a name or a folder to a transformers model and its adapter."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.adapter.refusals import keeps_state, unservable
from anee_core.errors import AneeError, InputError, ModelError, suggestion
from anee_core.hookspecs import SourceRequest
from anee_core.plugins import Plugins
from anee_core.ranges import check_kind

logger = logging.getLogger(__name__)

_WHERE = {
    "gguf_file",
    "revision",
    "token",
    "cache_dir",
    "subfolder",
    "trust_remote_code",
    "local_files_only",
    "force_download",
}
"""Options that say where a model is, for its config and tokenizer as well as for its weights."""

_LONGEST = 4096
"""Characters of a path, as file systems have it."""


def open_model(
    name: str,
    dtype: torch.dtype | None,
    device: torch.device | None,
    plugins: Plugins,
    options: dict[str, Any],
    find: Callable[[Any], ModelAdapter],
) -> tuple[nn.Module, Any]:
    """Return model and tokenizer of a source, a folder or a hub id.

    ``find`` raises for a config that cannot be run, before the weights are read.
    """
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
    if len(name) > _LONGEST:
        raise ModelError(f"a model's name or path has at most {_LONGEST:,} characters; got {len(name):,}")
    name, options = _with_gguf(name, options)
    base = _base_of(Path(name)) if os.path.isdir(name) else None
    folder = os.path.join(name, options.get("subfolder", ""))
    whole = "gguf_file" in options or os.path.isfile(os.path.join(folder, "config.json"))
    if base is None and os.path.exists(name) and not whole:
        raise ModelError(f"'{name}' is no model folder: it has no config.json")
    # A folder's own code runs only if that is asked for; unset, transformers would ask whoever is at the keyboard.
    options = {"trust_remote_code": False, **options}
    where = {key: options[key] for key in _WHERE & options.keys()}
    try:
        config = AutoConfig.from_pretrained(base or name, **where)
    except Exception as error:  # each way for a config to be wrong raises its own kind
        if os.path.isdir(name):
            raise ModelError(f"the model in '{name}' cannot be read: {' '.join(str(error).split())}") from error
        known = f"model sources: {', '.join(sorted(plugins.model_sources)) or 'none installed'}"
        raise ModelError(
            f"cannot find the model '{name}': it is no local folder, no installed model source, and the hub did not "
            f"give it ({_first_line(error)}); {known}"
        ) from error
    find(config)
    try:
        network, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or "auto", output_loading_info=True, **options
        )
    except Exception as error:  # safetensors, transformers and the hub each raise their own kinds
        raise ModelError(f"the model '{name}' cannot be loaded: {_first_line(error)}") from error
    if found["missing_keys"] and base is not None:
        raise ModelError(
            f"the adapter in '{name}' lacks the weight '{min(found['missing_keys'])}'; if PEFT saved it around a model "
            f"that ANEE had loaded, load it so again: PeftModel.from_pretrained(anee.load('{base}'), '{name}')"
        )
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
        own = base is None or (Path(name) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(name if own else base, **where)
        if not tokenizer.vocab_size:  # what some families get from a folder without tokenizer files
            raise ValueError("its vocabulary is empty")
    except Exception as error:
        logger.warning("no tokenizer for '%s' (%s): generate from token ids, or pass one", name, _first_line(error))
        tokenizer = None
    return network if device is None else network.to(device), tokenizer


def _with_gguf(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return folder and options for a GGUF file, or for a folder whose weights are one; others as they are.

    Raises:
        ModelError: the folder's weights are several such files.
    """
    path = Path(name)
    # Unlike Path's, these are False for a name that is too long.
    if path.suffix == ".gguf" and os.path.isfile(name):
        return str(path.parent), {**options, "gguf_file": path.name}
    folder = path / options.get("subfolder", "")
    found = sorted(file.name for file in folder.glob("*.gguf")) if os.path.isdir(folder) else []
    if not found or "gguf_file" in options or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return name, options
    if len(found) > 1:
        raise ModelError(f"'{name}' holds {len(found)} GGUF files: name one, as in gguf_file='{found[0]}'")
    return name, {**options, "gguf_file": found[0]}


def _base_of(folder: Path) -> str | None:
    """Return the model that a folder of PEFT's adapts, which transformers loads with it; None for another folder."""
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return None
    try:
        return str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"'{folder}' does not say what model it adapts: its adapter_config.json is damaged") from error


def adapter_of(config: Any, plugins: Plugins, required: bool = True) -> ModelAdapter | None:
    """Return the adapter of a model family; None if there is none and it is not ``required``.

    Raises:
        ModelError: there is none though it is required, or there can be none.
    """
    kind = config.model_type
    if kind in plugins.adapters:
        return plugins.adapters[kind]
    if config.is_encoder_decoder:
        raise ModelError(f"'{kind}' has an encoder: ANEE runs decoder-only models")
    reason = unservable(config)
    if reason is not None:
        raise ModelError(f"ANEE cannot run the family '{kind}' with this config: {reason}")
    network = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if network is not None and keeps_state(network, config):
        raise ModelError(
            f"layers of '{kind}' keep no key/value cache but a state of their own, which a skipped token would not "
            "enter: ANEE cannot run this family"
        )
    if not required:
        return None
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
    if given == "auto":
        return None
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    check_kind("dtype", given, str, "a torch dtype or its name")
    if given not in known:
        raise InputError(f"unknown dtype '{given}'; {suggestion(given, known)}")
    return known[given]


def device_of(given: str | torch.device | None) -> torch.device | None:
    """Return the device of a name, or raise `InputError` if it cannot be used."""
    if given is None:
        return None
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except Exception as error:  # each backend that is absent says so in its own way
        raise InputError(f"device '{given}' cannot be used: {_first_line(error).split('. ')[0]}") from error
    return device


def check_wrapper(model: nn.Module) -> None:
    """Raise `ModelError` for a PEFT model that is more than changed layers: what it adds in front would be lost."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            raise ModelError(
                f"the PEFT adapter '{name}' adds virtual tokens ({config.peft_type}), which ANEE cannot run; "
                "adapters inside the layers, such as LoRA, work"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ModelError(
                f"the PEFT adapter '{name}' works from its invocation tokens on (activated LoRA), which only PEFT's "
                "forward tells its layers; put PEFT around the loaded model instead, or use plain LoRA"
            )


def check_weights(model: nn.Module) -> None:
    """Raise `ModelError` if a weight is not a number: everything downstream would be silently wrong."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or not parameter.is_floating_point() or type(parameter) is not nn.Parameter:
            continue
        # The sum is one pass without a temporary; only a suspicious one is looked at closely.
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)) and not torch.isfinite(parameter).all():
            raise ModelError(f"weight '{name}' holds NaN or infinity; the checkpoint is corrupt, fetch it again")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
