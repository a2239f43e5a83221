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
from anee_core.generation.prompts import check_mask
from anee_core.generation.result import Generation
from anee_core.generation.rows import Rows

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
    if attention_mask is not None:
        check_mask(attention_mask, input_ids)
    chosen = choose_options(model, options, input_ids.shape[1])
    if beyond := settings_beyond(model):
        logger.warning("the generation config's %s is not followed here; generate() does", ", ".join(sorted(beyond)))
    assert chosen.max_new_tokens is not None
    longest = input_ids.shape[1] if attention_mask is None else int((attention_mask != 0).sum(-1).max())
    model.check_fits(longest + chosen.max_new_tokens - 1)  # the last one is not fed in again
    rules = decode_rules(model, chosen)
    rows = Rows(input_ids.to(model.device), chosen.max_new_tokens, rules.pad)
    cache = model.new_cache(rows.sequences.shape[1])
    fixed_batch = bool(chosen.logits_processor or chosen.stopping_criteria)
    streamer = chosen.streamer
    feed, mask = rows.tokens, attention_mask
    prompt_seconds, started = 0.0, time.perf_counter()
    if streamer is not None:
        streamer.put(feed.cpu())
    # What outlives the call is allocated above and by the cache; the rest needs no autograd bookkeeping at all.
    with torch.inference_mode(), model.recording(cache, rows.prompt) as trace:
        while rows.room:
            scores = rules.process(rows, model.next_logits(feed, mask, cache)[:, -1].float())
            token = rows.append(rules.draw(scores))
            if streamer is not None:
                streamer.put(token.cpu())
            prompt_seconds = prompt_seconds or time.perf_counter() - started
            if rows.close(rules.over(rows, token, scores)):
                if not rows.any_running:
                    break
                if not fixed_batch:
                    cache.reorder(rows.leave())
                    trace.rows = rows.batch, rows.places.cpu()
            feed, mask = rows.last, None
    seconds = time.perf_counter() - started
    if streamer is not None:
        streamer.end()
    return Generation(
        sequences=rows.finished(),
        new_tokens=rows.new_tokens(),
        trace=trace,
        prompt_seconds=prompt_seconds,
        decode_seconds=seconds - prompt_seconds,
    )
