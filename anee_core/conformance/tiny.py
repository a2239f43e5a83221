"""Configs small enough to check: read from files, or a family's default made small."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from anee_core.errors import InputError, suggestion

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
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def small_config(model_type: str, **sizes: int) -> Any:
    """Return the default config of a transformers family with every size made small, or as ``sizes`` say.

    Raises:
        InputError: transformers has no such family, or its config cannot be made small this way.
    """
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"transformers has no model family '{model_type}'; {suggestion(model_type, CONFIG_MAPPING)}")
    make = CONFIG_MAPPING[model_type]
    default = make()
    names = getattr(make, "attribute_map", {})
    wanted = _SMALL | sizes
    given = {k: v for k, v in wanted.items() if getattr(default, k, None) is not None}
    fields = {names.get(k, k): v for k, v in given.items() if not isinstance(getattr(make, k, None), property)}
    try:
        return make(**fields, **_SPECIAL)
    except Exception as error:  # each family checks its sizes in its own way
        raise InputError(
            f"the config of '{model_type}' cannot be made small by itself ({' '.join(str(error).split())}); "
            "pass a small config of your own"
        ) from error


def small_like(config: Any) -> Any:
    """Return a config of the same family with the same options, every size made small, and no number neutral.

    Kinds of layers keep their order; where six layers do not show all of them, the last ones do.

    Raises:
        InputError: it cannot be made small this way.
    """
    said = {key: value for key, value in config.to_dict().items() if value is not None}
    names = getattr(type(config), "attribute_map", {})
    small = {names.get(key, key): size for key, size in _SMALL.items() if names.get(key, key) in said}
    if said.get("num_key_value_heads") == said.get("num_attention_heads") and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    for key, value in said.items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            small[key] = _some_of_each(value)
        elif isinstance(value, float) and re.search(r"multiplier|scaling|scale$|softcap", key):
            small[key] = value * 1.25
    try:
        return type(config)(**(said | small | _SPECIAL))
    except Exception as error:  # each family checks its sizes in its own way
        raise InputError(
            f"the config of '{config.model_type}' cannot be made small by itself ({' '.join(str(error).split())})"
        ) from error


def _some_of_each(kinds: list[Any]) -> list[Any]:
    """Return the first kinds of a longer list of layers, and behind them those that they lack."""
    first = kinds[:_LAYERS]
    lacking = [kind for kind in dict.fromkeys(map(str, kinds)) if kind not in map(str, first)]
    by_name = {str(kind): kind for kind in kinds}
    return [*first[: _LAYERS - len(lacking)], *(by_name[name] for name in lacking)]


def read_configs(path: Path) -> dict[str, Any]:
    """Return the config in a JSON file, or those in a folder's ``*.json``, by file name without its ending.

    Raises:
        InputError: there is none, or a file is no config that transformers knows.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"the folder '{path}' has no .json config")
    return {file.stem: _read(file) for file in files}


def _read(file: Path) -> Any:
    try:
        values = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read the config '{file}': {error}") from error
    model_type = values.pop("model_type", None) if isinstance(values, dict) else None
    if model_type is None:
        raise InputError(f"the config '{file}' says no model_type")
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"'{file}' is of the unknown family '{model_type}'; {suggestion(model_type, CONFIG_MAPPING)}")
    try:
        return CONFIG_MAPPING[model_type](**values)
    except Exception as error:
        raise InputError(f"the config '{file}' is wrong: {' '.join(str(error).split())}") from error
