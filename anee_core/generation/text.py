"""Generation from text to text."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
)

from anee_core.errors import InputError, suggestion
from anee_core.generation.decodable import Decodable
from anee_core.generation.decode import decode
from anee_core.generation.options import DecodeOptions, settings_beyond
from anee_core.generation.result import Generation


@torch.no_grad()
def generate_text(model: Decodable, prompts: str | Sequence[str], **options: Any) -> Generation:
    """Continue one prompt or several.

    Options of `decode` go through the lean loop; any others (``num_beams``, ...) through transformers' ``generate``.

    Raises:
        InputError: there is no tokenizer, or a prompt is empty or longer than the model's context.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError("prompts are a string or a list of strings, at least one; token ids come as a tensor")
    input_ids, attention_mask = _encode(model, texts)
    lean = set(DecodeOptions.__dataclass_fields__)
    known = lean | set(GenerationConfig().to_dict()) | set(inspect.signature(GenerationMixin.generate).parameters)
    if unknown := set(options) - known:
        raise InputError(f"no option '{min(unknown)}'; {suggestion(min(unknown), lean)}, and those of transformers")
    beyond = settings_beyond(model)
    if set(options) <= lean and not beyond:
        result = decode(model, input_ids, attention_mask if len(texts) > 1 else None, **options)
    else:
        result = _through_transformers(model, input_ids, attention_mask, options)
    rows_per_prompt = len(result.new_tokens) // len(texts)
    result.completions = [model.tokenizer.decode(row, skip_special_tokens=True) for row in result.new_tokens]
    result.texts = [texts[i // rows_per_prompt] + new for i, new in enumerate(result.completions)]
    labels = [model.tokenizer.convert_ids_to_tokens(row.tolist()) for row in result.sequences]
    result.trace.tokens = [[_label(model.tokenizer, token) for token in row] for row in labels]
    return result


def _through_transformers(
    model: Decodable, input_ids: Tensor, attention_mask: Tensor, options: dict[str, Any]
) -> Generation:
    """Generate as transformers does."""
    if options.pop("seed", None) is not None:
        raise InputError("seed is an option of the lean loop, and others are not; call transformers.set_seed instead")
    options.setdefault("pad_token_id", _pad_id(model))
    started = time.perf_counter()
    sequences = model.generate(input_ids, attention_mask=attention_mask, tokenizer=model.tokenizer, **options)
    seconds = time.perf_counter() - started
    sequences = getattr(sequences, "sequences", sequences)
    assert model.last_trace is not None
    eos = options.get("eos_token_id", model.generation_config.eos_token_id)
    ends = set(eos if isinstance(eos, list) else [eos])
    new = [_until(row, ends) for row in sequences[:, input_ids.shape[1] :].tolist()]
    return Generation(sequences, new, model.last_trace, decode_seconds=seconds)


def _until(row: list[int], ends: set[Any]) -> list[int]:
    """Return new tokens up to the first that ends the sequence, with it: padding follows."""
    last = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: last + 1]


def _encode(model: Decodable, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return token ids and mask [B, T], padded on the left."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError("text needs a tokenizer: pass one to anee.load, or generate from token ids")
    rows = [tokenizer(text)["input_ids"] for text in texts]
    limit = model.adapter.max_positions(model.config)
    for row, text in zip(rows, texts, strict=True):
        if not text or not row:
            raise InputError("the prompt is empty; give at least one word")
        if limit is not None and len(row) >= limit:
            raise InputError(f"the prompt has {len(row)} tokens and the model's context {limit}; shorten the prompt")
    longest = max(len(row) for row in rows)
    pad = _pad_id(model)
    input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return input_ids.to(model.device), attention_mask.to(model.device)


def _pad_id(model: Decodable) -> int:
    tokenizer = model.tokenizer
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _label(tokenizer: Any, token: str) -> str:
    return str(tokenizer.convert_tokens_to_string([token]))
