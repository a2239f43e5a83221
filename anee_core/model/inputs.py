"""Read and check what a forward is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anee_core.adapter.layout import Parts
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.engine.block import Block
from anee_core.errors import InputError
from anee_core.model.context import Context
from anee_core.ranges import check_kind


@dataclass(frozen=True)
class Inputs:
    """What a forward is given of its tokens."""

    input_ids: Tensor | None = None
    """[B, T] new tokens; None if their embeddings are given."""
    attention_mask: Tensor | None = None
    """[B, S + T] for S tokens seen before, or [B, T], 0 for padding; None for no padding."""
    position_ids: Tensor | None = None
    """[B, T] positions that the model encodes; None to count them over the real tokens of each row."""
    inputs_embeds: Tensor | None = None
    """[B, T, D] instead of ``input_ids``."""

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            if given is not None:
                check_kind(name, given, Tensor, "a tensor")


def read_block(
    parts: Parts, inputs: Inputs, cache: AdaptiveCache, context: Context, ends_prompt: bool = False
) -> Block:
    """Return the block of new tokens; ``ends_prompt`` says that the last one of a prompt is among them.

    Raises:
        InputError: something is missing, of the wrong shape, or too long for the model.
    """
    input_ids, inputs_embeds = inputs.input_ids, inputs.inputs_embeds
    attention_mask, position_ids = inputs.attention_mask, inputs.position_ids
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("give either input_ids or inputs_embeds")
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    if given.dim() != (2 if input_ids is not None else 3) or given.shape[0] == 0 or given.shape[1] == 0:
        raise InputError(
            "input_ids is [batch, tokens] and inputs_embeds [batch, tokens, width], none empty; "
            f"got {tuple(given.shape)}"
        )
    batch, tokens = given.shape[:2]
    cache.check_batch(batch)
    device = parts.embedding.weight.device
    real = _real_tokens(attention_mask, (batch, tokens), cache, device)
    if ends_prompt and real is not None:
        _check_rows(real, first=cache.seen == 0)
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens:
            raise InputError(f"position_ids is [{batch}, {tokens}] like the tokens; got {tuple(position_ids.shape)}")
        position_ids = position_ids.to(device).expand(batch, -1)
    counted = _count_positions(real, attention_mask, (batch, tokens), cache, device)
    if position_ids is not None or context.concerns(cache.seen + tokens):
        _check_positions(counted if position_ids is None else position_ids, real, context)
    embeddings = _embeddings(parts, inputs, one_more=cache.seen > 0 and tokens == 1)
    return Block(
        embeddings=embeddings,
        position_ids=counted,
        input_ids=None if input_ids is None else input_ids.to(device),
        real=real,
        phase="prefill" if cache.seen == 0 or tokens > 1 else "decode",
        given_positions=position_ids,
    )


def _embeddings(parts: Parts, inputs: Inputs, one_more: bool) -> Tensor:
    """Return the embeddings [B, T, D] of the tokens; ``one_more`` says that each row goes on by a single one."""
    table, ids, given = parts.embedding.weight, inputs.input_ids, inputs.inputs_embeds
    if ids is None:
        assert given is not None
        if given.shape[2] != table.shape[1]:
            raise InputError(f"inputs_embeds is [batch, tokens, {table.shape[1]}]; got {tuple(given.shape)}")
        if not bool(given.isfinite().all()):
            raise InputError("inputs_embeds holds numbers that are not finite")
        return given
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"input_ids are whole numbers; got {ids.dtype}")
    # Looking takes time of every token: the embedding finds it on a CPU, and what is generated elsewhere is right.
    if not one_more or ids.device != table.device:
        _check_ids(ids, table.shape[0])
    try:
        found: Tensor = parts.embedding(ids.to(table.device))
    except IndexError:
        _check_ids(ids, table.shape[0])
        raise
    return found


def _check_ids(input_ids: Tensor, vocabulary: int) -> None:
    """Raise `InputError` unless all ids are in the vocabulary."""
    low, high = torch.stack(input_ids.aminmax()).tolist()
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise InputError(
            f"token id {wrong} is not in the vocabulary of {vocabulary}: is the tokenizer the model's own?"
        )


def _check_positions(position_ids: Tensor, real: Tensor | None, context: Context) -> None:
    """Raise `InputError` for positions [B, T] of real tokens that do not exist."""
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise InputError(f"position_ids are whole numbers; got {position_ids.dtype}")
    of_tokens = position_ids if real is None else position_ids[real]
    if of_tokens.numel():
        low, high = torch.stack(of_tokens.aminmax()).tolist()
        if low < 0:
            raise InputError(f"position_ids are at least 0; got {low}")
        context.check(high + 1)


def _real_tokens(
    mask: Tensor | None, shape: tuple[int, int], cache: AdaptiveCache, device: torch.device
) -> Tensor | None:
    """Return which of the new tokens are real, [B, T] bool, or None if all are."""
    batch, tokens = shape
    if mask is None:
        return None
    if mask.dim() != 2:
        raise InputError(f"attention_mask is [batch, tokens] with 0 for padding; got {tuple(mask.shape)}")
    if mask.shape[0] != batch or mask.shape[1] not in (cache.seen + tokens, tokens):
        raise InputError(
            f"attention_mask is [{batch}, {cache.seen + tokens}] for {cache.seen} tokens seen and {tokens} new ones; "
            f"got {tuple(mask.shape)}"
        )
    real = mask[:, -tokens:].to(device) != 0
    return None if bool(real.all()) else real


def _check_rows(real: Tensor, first: bool) -> None:
    """Raise `InputError` for a row of [B, T] without a real token, where the first or a later piece ends a prompt."""
    some = real.any(1)
    if not bool(some.all()):
        row = int((~some).nonzero()[0])
        why = "is all padding; leave it out" if first else "ends with a piece of padding; pad on the left"
        raise InputError(f"row {row} of the batch {why}")


def _count_positions(
    real: Tensor | None,
    mask: Tensor | None,
    shape: tuple[int, int],
    cache: AdaptiveCache,
    device: torch.device,
) -> Tensor:
    """Count positions over the real tokens of each row, [B, T]; padding gets the position before it, at least 0."""
    batch, tokens = shape
    before = torch.full((batch, 1), cache.seen, device=device)
    if mask is not None and mask.shape[1] == cache.seen + tokens:
        before = (mask[:, : cache.seen] != 0).sum(1, keepdim=True).to(device)
    elif cache.seen and (cache.layers[0].slots.gaps or not cache.layers[0].slots.full):
        before = cache.next_positions()
    if tokens == 1 and real is None:
        return before
    ahead = torch.arange(1, tokens + 1, device=device).expand(batch, -1) if real is None else real.cumsum(1)
    return (before + ahead - 1).clamp(min=0)
