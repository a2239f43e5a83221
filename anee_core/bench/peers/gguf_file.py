"""Write models of the LLaMA and GPT-2 families as GGUF files, for llama.cpp to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anee_core.errors import MissingPackageError, ModelError

_CONV1D = ("c_attn", "c_fc", "c_proj")
_TYPES = (torch.float32, torch.bfloat16)


def write_gguf(network: Any, path: Path) -> None:
    """Write the weights of a transformers model, without its tokenizer; matrices keep their type.

    Raises:
        ModelError: the model's family or dtype is not supported.
        MissingPackageError: gguf is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingPackageError("writing GGUF files needs gguf: pip install 'anee[peers]'") from error
    config = network.config
    if config.model_type not in ("llama", "gpt2") or network.dtype not in _TYPES:
        raise ModelError(
            f"cannot write a {config.model_type} in {network.dtype} as GGUF: llama and gpt2 in float32 or bfloat16"
        )
    llama = config.model_type == "llama"
    if llama:
        _check_plain(config)
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _add_names_of_tokens(writer, gguf, config.vocab_size)
    if llama:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.head_dim)
    else:
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    kind = gguf.MODEL_ARCH.LLAMA if llama else gguf.MODEL_ARCH.GPT2
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, weight in network.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise ModelError(f"there is no GGUF name for {name}")
        if name.endswith(tuple(f"{part}.weight" for part in _CONV1D)):
            weight = weight.T
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", getattr(config, "num_key_value_heads", 0)),
        ):
            if part in name:
                weight = _neighbours(weight, heads)
        _add(writer, gguf, called, weight.detach().cpu().contiguous())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def token_of(name: str) -> int:
    """Return the id of the token that `write_gguf` gives this name."""
    return int(name.strip("<>"))


def _add_names_of_tokens(writer: Any, gguf: Any, count: int) -> None:
    """Add a made-up vocabulary: engines want one, though they are given ids and asked for ids."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{i}>" for i in range(count)])
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * count)
    writer.add_token_merges(["< 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _check_plain(config: Any) -> None:
    """Raise `ModelError` if a LLaMA has something that other engines would read otherwise, or not at all."""
    odd = {
        "scaled rotary positions": config.rope_parameters.get("rope_type", "default") != "default",
        "heads that are not width / heads wide": config.head_dim * config.num_attention_heads != config.hidden_size,
        "biases": config.attention_bias or config.mlp_bias,
    }
    found = [name for name, has in odd.items() if has]
    if found:
        raise ModelError(f"cannot write a llama with {' and '.join(found)} as GGUF")


def _neighbours(weight: Tensor, heads: int) -> Tensor:
    """Return a projection [H * Dh, D] with the pairs that rotary positions turn next to each other."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _add(writer: Any, gguf: Any, name: str, weight: Tensor) -> None:
    if weight.dim() == 1 or weight.dtype == torch.float32:
        writer.add_tensor(name, weight.float().numpy())
    else:
        writer.add_tensor(name, weight.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
