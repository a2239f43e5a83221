"""The lean decode loop."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor

from anee_core.errors import InputError
from anee_core.generation.decodable import Decodable
from anee_core.generation.options import choose_options, decode_rules, settings_beyond
from anee_core.generation.result import Generation

logger = logging.getLogger(__name__)


@torch.no_grad()
def decode(model: Decodable, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Generation:
    """Generate greedily or by sampling, doing nothing per token that is not needed.

    Rows that have ended leave the batch, unless own processors or criteria are passed, which may count on its order.

    Args:
        model: the model.
        input_ids: [B, T] prompts, padded on either side if ``attention_mask`` [B, T] says so.
        attention_mask: 0 for padding.
        options: see `DecodeOptions`. ``seed`` seeds the sampling of this call alone.

    Raises:
        InputError: an option is unknown or out of range, or the prompts cannot be run.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        got = (
            f"a tensor of shape {tuple(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        )
        raise InputError(f"input_ids is a tensor [batch, tokens]; got {got}")
    chosen = choose_options(model, options)
    if beyond := settings_beyond(model):
        logger.warning("the generation config's %s is not followed here; generate() does", ", ".join(sorted(beyond)))
    _check_length(model, input_ids.shape[-1], chosen.max_new_tokens)
    device = model.device
    input_ids = input_ids.to(device)
    batch, length = input_ids.shape
    processors, criteria, eos = decode_rules(model, chosen, device)
    generator = None if chosen.seed is None else torch.Generator(device).manual_seed(chosen.seed)
    fixed_batch = bool(chosen.logits_processor or chosen.stopping_criteria)
    pad = chosen.pad_token_id if chosen.pad_token_id is not None else int(eos[0]) if len(eos) else 0
    assert chosen.max_new_tokens is not None

    cache = model.new_cache(length + chosen.max_new_tokens)
    sequences = input_ids.new_full((batch, length + chosen.max_new_tokens), pad)
    sequences[:, :length] = input_ids
    ends = torch.full((batch,), sequences.shape[1])
    rows = torch.arange(batch, device=device)
    running = torch.ones(batch, dtype=torch.bool, device=device)
    feed, mask = input_ids, attention_mask
    prompt_seconds, started = 0.0, time.perf_counter()
    if chosen.streamer is not None:
        chosen.streamer.put(input_ids.cpu())
    # What outlives the call is allocated above and by the cache; the rest needs no autograd bookkeeping at all.
    with torch.inference_mode(), model.recording(cache) as trace:
        for end in range(length + 1, sequences.shape[1] + 1):
            scores = model.next_logits(feed, mask, cache)[:, -1].float()
            if processors:
                scores = processors(sequences[rows, : end - 1], scores)
            token = torch.where(running, _draw(scores, bool(chosen.do_sample), generator), pad)
            sequences[rows, end - 1] = token
            if chosen.streamer is not None:
                chosen.streamer.put(token.cpu())
            if end == length + 1:
                prompt_seconds = time.perf_counter() - started
            over = torch.isin(token, eos)
            if criteria:
                over = over | criteria(sequences[rows, :end], scores)
            # The one host read of the loop.
            closing = (over & running).cpu()
            if bool(closing.any()):
                ends[rows.cpu()[closing]] = end
                running = running & ~over
                if not bool(running.any()):
                    break
                if not fixed_batch:
                    stay = running.nonzero()[:, 0]
                    cache.reorder(stay)
                    rows, token, running = rows[stay], token[stay], running[stay]
                    trace.rows = (batch, rows.cpu())
            feed, mask = token[:, None], None
    seconds = time.perf_counter() - started
    if chosen.streamer is not None:
        chosen.streamer.end()
    sequences = sequences[:, : int(ends.max())]
    return Generation(
        sequences=sequences,
        new_tokens=[row[length:last].tolist() for row, last in zip(sequences.cpu(), ends.tolist(), strict=True)],
        trace=trace,
        prompt_seconds=prompt_seconds,
        decode_seconds=seconds - prompt_seconds,
    )


def _draw(scores: Tensor, do_sample: bool, generator: torch.Generator | None) -> Tensor:
    """Return one token id per row of scores [B, V]."""
    if not do_sample:
        # numpy's takes a tenth of the time of torch's on the CPU, over the last dimension.
        return torch.from_numpy(scores.numpy().argmax(-1)) if scores.is_cpu else scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def _check_length(model: Decodable, prompt: int, new: int | None) -> None:
    limit = model.adapter.max_positions(model.config)
    # The last new token is not fed in again.
    if limit is not None and prompt + (new or 1) - 1 > limit:
        raise InputError(
            f"{prompt} tokens of prompt and {new} new ones do not fit the model's context of {limit}; "
            "shorten the prompt or lower max_new_tokens"
        )
