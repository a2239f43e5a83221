"""Generation from text to text."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from anee_core.errors import InputError, suggestion
from anee_core.generation.decodable import Decodable
from anee_core.generation.decode import decode
from anee_core.generation.options import DecodeOptions, check_settings, settings_beyond
from anee_core.generation.prompts import pad_id, read_prompts
from anee_core.generation.result import Generation

_MORE = ("output_scores", "output_logits", "output_hidden_states", "output_attentions", "return_dict_in_generate")
"""Options of transformers' ``generate`` that return more than tokens."""


@torch.no_grad()
def generate_text(model: Decodable, prompts: str | Sequence[Any], **options: Any) -> Generation:
    """Continue one prompt or several, each a text or a chat; see `anee_core.generation.prompts.read_prompts`.

    Options of `decode` go through the lean loop; any others (``num_beams``, ...) through transformers' ``generate``.

    Raises:
        InputError: there is no tokenizer, a prompt is empty, or an option cannot be followed.
    """
    read = read_prompts(model, prompts)
    texts, input_ids, attention_mask = read.texts, read.input_ids, read.attention_mask
    lean = set(DecodeOptions.__dataclass_fields__)
    known = lean | set(GenerationConfig().to_dict()) | set(inspect.signature(GenerationMixin.generate).parameters)
    if unknown := set(options) - known:
        raise InputError(f"no option '{min(unknown)}'; {suggestion(min(unknown), lean)}, and those of transformers")
    check_settings(options)
    _check_returned(model, options)
    beyond = settings_beyond(model)
    if set(options) <= lean and not beyond:
        result = decode(model, input_ids, attention_mask if len(texts) > 1 else None, **options)
    else:
        result = _through_transformers(model, input_ids, attention_mask, options)
    rows_per_prompt = len(result.new_tokens) // len(texts)
    prompts_again = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
    result.completions = [
        _completion(model.tokenizer, prompts_again[i // rows_per_prompt], new)
        for i, new in enumerate(result.new_tokens)
    ]
    result.texts = [texts[i // rows_per_prompt] + new for i, new in enumerate(result.completions)]
    labels = [model.tokenizer.convert_ids_to_tokens(row.tolist()) for row in result.sequences]
    result.trace.tokens = [[_label(model.tokenizer, token) for token in row] for row in labels]
    return result


def _check_returned(model: Decodable, options: dict[str, Any]) -> None:
    """Raise `InputError` if more is asked for than a `Generation` holds."""
    configs = (options.get("generation_config"), model.generation_config)
    for name in _MORE:
        if options.get(name) or (name not in options and any(getattr(config, name, None) for config in configs)):
            raise InputError(f"{name} is for token ids: tokenize the text and call generate(input_ids, {name}=True)")


def _through_transformers(
    model: Decodable, input_ids: Tensor, attention_mask: Tensor, options: dict[str, Any]
) -> Generation:
    """Generate as transformers does."""
    if options.pop("seed", None) is not None:
        raise InputError("seed is an option of the lean loop, and others are not; call transformers.set_seed instead")
    given = options.get("generation_config")
    if given is None:
        options.setdefault("pad_token_id", pad_id(model.tokenizer))
    elif given.pad_token_id is None:
        given = options["generation_config"] = copy.copy(given)
        given.pad_token_id = pad_id(model.tokenizer)
    started = time.perf_counter()
    sequences = model.generate(input_ids, attention_mask=attention_mask, tokenizer=model.tokenizer, **options)
    seconds = time.perf_counter() - started
    sequences = getattr(sequences, "sequences", sequences)
    assert model.last_trace is not None
    start = input_ids.shape[1]
    if model.last_ends is None:
        ends, pad = _specials(model, options)
        new = [_without_padding(row, ends, pad) for row in sequences[:, start:].tolist()]
    else:
        new = [row[start:end] for row, end in zip(sequences.tolist(), model.last_ends, strict=True)]
    return Generation(sequences, new, model.last_trace, decode_seconds=seconds)


def _specials(model: Decodable, options: dict[str, Any]) -> tuple[set[int], int | None]:
    """Return the tokens that end a sequence, and the one that pads it, as transformers takes them."""
    configs = [each for each in (options.get("generation_config"), model.generation_config) if each is not None]

    def effective(name: str) -> Any:
        found = [options.get(name), *(getattr(config, name) for config in configs)]
        return next((value for value in found if value is not None), None)

    eos = effective("eos_token_id")
    return set(eos if isinstance(eos, list) else [] if eos is None else [eos]), effective("pad_token_id")


def _without_padding(row: list[int], ends: set[int], pad: int | None) -> list[int]:
    """Return new tokens up to the first that ends the sequence, with it, or up to the padding behind them."""
    last = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    while last and row[last - 1] == pad and pad not in ends:
        last -= 1
    return row[:last]


def _completion(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """Return new tokens as text that goes on where the prompt ends.

    Decoders strip the space before a first token, so the row is decoded whole and the prompt cut off.
    """
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode(prompt + new, skip_special_tokens=True)
    return str(whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True))


def _label(tokenizer: Any, token: str) -> str:
    return str(tokenizer.convert_tokens_to_string([token]))
