"""Configs small enough to check: read from files, or a family's default made small."""

from __future__ import annotations

import inspect
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from anee_core.errors import InputError, suggestion

logger = logging.getLogger(__name__)

_LAYERS = 6
# All different, so that one cannot be taken for another unnoticed.
_SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "word_embed_proj_dim": 24,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "rotary_dim": 4,
    "query_pre_attn_scalar": 12,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 128,
    "sliding_window": 5,
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "n_group": 3,
    "topk_group": 2,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
}
_OWN: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 6, "moe_top_k": 3},
    },
    "helium": {"head_dim": 8},
}
"""Sizes of families that cannot have those above."""
_NEEDED = frozenset({"head_dim", "num_key_value_heads"})
"""Sizes of which some families have no default, though their models need one."""
_STATES = frozenset({"linear_attention", "mamba"})
"""Kinds of layers that keep a state."""
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def small_config(model_type: str, **sizes: int) -> Any:
    """Return the default config of a transformers family with every size made small, or as ``sizes`` say.

    Options that do nothing by default are set: windows, factors and caps.

    Raises:
        InputError: transformers has no such family, or its config cannot be made small this way.
    """
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"transformers has no model family '{model_type}'; {suggestion(model_type, CONFIG_MAPPING)}")
    default = CONFIG_MAPPING[model_type]()
    windows = {"sliding_window": _SMALL["sliding_window"], "use_sliding_window": True}
    return small_like(default, **{key: value for key, value in windows.items() if hasattr(default, key)}, **sizes)


def small_like(config: Any, **changes: Any) -> Any:
    """Return a config of the same family with the same options, every size made small, and no factor neutral.

    Kinds of layers keep their order; where six layers do not show all of them, the last ones do.

    Args:
        config: a config of the family.
        changes: what is to be as given.

    Raises:
        InputError: it cannot be made small this way.
    """
    names = getattr(type(config), "attribute_map", {})
    known = {names.get(key, key): value for key, value in _SMALL.items()}
    known = {key: value for key, value in known.items() if not isinstance(getattr(type(config), key, None), property)}
    said = config.to_dict()
    small: dict[str, Any] = {key: size for key, size in known.items() if said.get(key) is not None}
    others = {key: value for key, value in said.items() if key not in known}
    small |= {key: _small_option(key, value, config.num_hidden_layers) for key, value in others.items()}
    small |= _OWN.get(config.model_type, {})
    if "kv_lora_rank" in small:  # each query has a key of its own
        small["num_key_value_heads"] = small["num_attention_heads"]
    kinds = said.get("layer_types")
    # Where a config chooses the kinds, layers that attend can be had.
    if kinds and _STATES.issuperset(kinds) and "layer_types" in inspect.signature(type(config)).parameters:
        small["layer_types"] = ["full_attention"] * _LAYERS
    unnamed = {key: known[key] for key in _NEEDED if key in said and key not in small}
    errors = []
    # Some families need a head's width to be what is left of the model's, others need it to be said.
    for variant in ({}, {"head_dim": _SMALL["hidden_size"] // _SMALL["num_attention_heads"]}, unnamed):
        fields = {key: value for key, value in variant.items() if key in said}
        try:
            made = type(config)(**(small | fields | changes | _SPECIAL))
            _run(made)
        except Exception as error:  # each family checks its sizes in its own way
            errors.append(" ".join(str(error).split()))
        else:
            return made
    raise InputError(
        f"the config of '{config.model_type}' cannot be made small by itself ({errors[0]}); "
        "pass a small config of your own"
    )


def _run(config: Any) -> None:
    """Run a model with this config, if there is a causal LM of it."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            AutoModelForCausalLM.from_config(config).eval()(torch.arange(3, 9)[None])


def _small_option(key: str, value: Any, layers: int) -> Any:
    """Return what becomes of an option that is no size."""
    if isinstance(value, list) and len(value) == layers:
        return _some_of_each(value)
    if re.search(r"softcap", key) and value is None:
        return 3.0
    if isinstance(value, float) and re.search(r"multiplier|scaling|scale$|softcap", key):
        return value * 1.25
    return value


def _some_of_each(kinds: list[Any]) -> list[Any]:
    """Return the first kinds of a longer list of layers, and behind them those that they lack."""
    first = kinds[:_LAYERS]
    lacking = [kind for kind in dict.fromkeys(map(str, kinds)) if kind not in map(str, first)]
    by_name = {str(kind): kind for kind in kinds}
    return [*first[: _LAYERS - len(lacking)], *(by_name[name] for name in lacking)]


def read_configs(path: Path) -> dict[str, Any]:
    """Return the config in a JSON file, or those in a folder's ``*.json``, by file name without its ending.

    Of a folder, families that the installed transformers does not have are left out, and named in a warning: those
    that came later than it.

    Raises:
        InputError: there is none, or a file is no config that transformers knows.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    values = {file: _values(file) for file in files}
    if path.is_dir():
        absent = [file.stem for file, fields in values.items() if fields["model_type"] not in CONFIG_MAPPING]
        if absent:
            logger.warning("transformers %s has no such families: %s", transformers.__version__, ", ".join(absent))
        values = {file: fields for file, fields in values.items() if file.stem not in absent}
    if not values:
        raise InputError(f"the folder '{path}' has no .json config of a family that transformers has")
    return {file.stem: _config(file, dict(fields)) for file, fields in values.items()}


def _values(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read the config '{file}': {error}") from error
    if not isinstance(values, dict) or values.get("model_type") is None:
        raise InputError(f"the config '{file}' says no model_type")
    return values


def _config(file: Path, values: dict[str, Any]) -> Any:
    model_type = values.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"'{file}' is of the unknown family '{model_type}'; {suggestion(model_type, CONFIG_MAPPING)}")
    try:
        return CONFIG_MAPPING[model_type](**values)
    except Exception as error:
        raise InputError(f"the config '{file}' is wrong: {' '.join(str(error).split())}") from error
