"""What a policy makes of a text: perplexity, how far it is from the dense model, what it spends and what it drops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anee_core.errors import InputError
from anee_core.evaluation.divergence import divergences, losses
from anee_core.files import read_text
from anee_core.model.adaptive_model import AdaptiveModel

_WIKITEXT = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))


@dataclass(frozen=True)
class TextQuality:
    """Figures of a policy on a text, over the scored positions."""

    perplexity: float
    """Perplexity of the next tokens."""
    spent: float
    """What a token spends of the decoder-layer FLOPs that it would dense, on average over all positions."""
    skipped: float
    """Share of (layer, token) pairs that were skipped, over all positions."""
    dropped: float
    """Share of the context that layers no longer held: of all pairs of a token and an earlier one."""
    kv_bytes: float
    """Bytes allocated for keys and values, and what a policy keeps beside them, at the end of a block."""
    divergence: float = math.nan
    """Mean KL(dense || policy) in nats per token; NaN if there was nothing to compare with."""
    agreement: float = math.nan
    """Share of positions at which the likeliest token is the dense model's; NaN if there was none to compare with."""


def text_blocks(model: AdaptiveModel, path: str | Path, length: int, count: int) -> Tensor:
    """Return the first ``count`` blocks [N, T] of ``length`` tokens of a text file. WikiText's spacing is undone.

    Raises:
        InputError: there is no such file, it is too short, or the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise InputError("evaluation reads text: the model needs a tokenizer")
    text = read_text(path)
    for raw, plain in _WIKITEXT:
        text = text.replace(raw, plain)
    ids = model.tokenizer(text[: count * length * 12], return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < count * length:
        raise InputError(f"{path}: {len(ids)} tokens are fewer than {count} blocks of {length}")
    blocks: Tensor = ids[: count * length].view(count, length)
    return blocks


def text_quality(
    model: AdaptiveModel,
    blocks: Tensor,
    first: int = 1,
    batch: int = 1,
    dense: Sequence[Tensor] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> TextQuality:
    """Run a model on token ids [N, T] as it is deployed, and return its figures.

    Args:
        model: runs under its policy.
        blocks: token ids [N, T].
        first: first position that is scored, at least 1.
        batch: blocks at once.
        dense: what `dense_logits` returned for the same blocks, ``first`` and ``batch``.
        advance: called after each batch.
    """
    if not 1 <= first < blocks.shape[1]:
        raise InputError(f"the first scored position lies in [1, {blocks.shape[1]}); got {first}")
    loss = spent = skipped = kv_bytes = divergence = agree = 0.0
    held = []
    before = torch.arange(first, blocks.shape[1], dtype=torch.float64)
    for i, rows in enumerate(torch.split(blocks, batch)):
        logits = _logits(model, rows, first)
        trace = model.last_trace
        assert trace is not None
        share = len(rows) / len(blocks)
        loss += share * _loss(logits, rows, first)
        # Of tokens, not of what was executed: rows of a batch may repeat a token to be as long as others.
        spent += share * float(model.engine.costs.spent_shares(trace.ran).mean())
        skipped += share * (1 - trace.layers_run)
        kv_bytes += trace.kv_bytes / len(blocks)
        held.append((trace.held[:, :, first:] - 1).double().mean((0, 1)) * share)
        if dense is not None:
            divergence += share * float(divergences(dense[i], logits).mean())
            agree += share * float((dense[i].argmax(-1) == logits.argmax(-1)).float().mean())
        advance()
    dropped = 1 - float(torch.stack(held).sum() / before.sum())
    compared = (divergence, agree) if dense is not None else ()
    return TextQuality(math.exp(loss), spent, skipped, dropped, kv_bytes, *compared)


def dense_logits(model: AdaptiveModel, blocks: Tensor, first: int = 1, batch: int = 1) -> list[Tensor]:
    """Return the dense model's next-token logits [B, T - first, V] of each batch, to compare policies with.

    Its layers run as the model's do, so that nothing but the policy sets the two apart.
    """
    plain = AdaptiveModel(model.model, model.adapter).use_step(model.engine.step)
    return [_logits(plain, rows, first) for rows in torch.split(blocks, batch)]


def dense_perplexity(dense: Sequence[Tensor], blocks: Tensor, first: int = 1, batch: int = 1) -> float:
    """Return the perplexity that belongs to what `dense_logits` returned for the same arguments."""
    rows = torch.split(blocks, batch)
    losses = (_loss(logits, some, first) * len(some) for logits, some in zip(dense, rows, strict=True))
    return math.exp(sum(losses) / len(blocks))


def _loss(logits: Tensor, rows: Tensor, first: int) -> float:
    return float(losses(logits, rows[:, first:].to(logits.device)).mean())


def _logits(model: AdaptiveModel, rows: Tensor, first: int) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(rows.to(model.device), use_cache=False).logits[:, first - 1 : -1]
    return logits.float()
