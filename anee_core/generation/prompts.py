"""Prompts as token ids: of texts and of chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anee_core.errors import InputError
from anee_core.generation.decodable import Decodable
from anee_core.ranges import check_kind


@dataclass(frozen=True)
class Prompts:
    """Prompts that were read."""

    texts: list[str]
    """Each prompt as text; a chat as its template writes it."""
    input_ids: Tensor
    """[B, T] token ids, padded on the left."""
    attention_mask: Tensor
    """[B, T], 0 for padding."""


def check_mask(attention_mask: Any, input_ids: Tensor) -> None:
    """Raise `InputError` unless a mask is one for token ids [B, T]."""
    check_kind("attention_mask", attention_mask, Tensor, "a tensor [batch, tokens]")
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask is {list(input_ids.shape)} like the token ids; got {list(attention_mask.shape)}"
        )


def read_prompts(model: Decodable, prompts: str | Sequence[Any]) -> Prompts:
    """Read a text or a chat, or a list of texts and chats.

    A chat is a list of messages, each a mapping with "role" and "content"; the tokenizer's template turns it into text
    that the model's answer follows.

    Raises:
        InputError: there is no tokenizer or template, or a prompt is empty.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError("text needs a tokenizer: pass one to anee.load, or generate from token ids")
    alone = isinstance(prompts, str) or _is_chat(prompts)
    given = [prompts] if alone else list(prompts)
    if not given or not all(isinstance(one, str) or _is_chat(one) for one in given):
        raise InputError(
            "prompts are a string, a chat (a list of messages with 'role' and 'content') or a list of these, at least "
            "one; token ids come as a tensor [batch, tokens]"
        )
    texts = [one if isinstance(one, str) else _written(tokenizer, one) for one in given]
    # A template writes the special tokens itself.
    rows = [
        tokenizer(text, add_special_tokens=isinstance(one, str))["input_ids"]
        for text, one in zip(texts, given, strict=True)
    ]
    if not all(texts) or not all(rows):
        raise InputError("the prompt is empty; give at least one word")
    longest, pad = max(len(row) for row in rows), pad_id(tokenizer)
    input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return Prompts(texts, input_ids.to(model.device), attention_mask.to(model.device))


def pad_id(tokenizer: Any) -> int:
    """Return the token that pads rows: the tokenizer's own, or another that does no harm there."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in prompt)
    )


def _written(tokenizer: Any, chat: Any) -> str:
    """Return a chat as text, up to where the model answers."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("the tokenizer has no chat template: set tokenizer.chat_template, or give the chat as text")
    return str(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True))
