"""The lean decode loop, and text in, text out."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from anee_core.errors import InputError, suggestion
from anee_core.trace import Trace

if TYPE_CHECKING:
    from anee_core.model import AdaptiveModel

logger = logging.getLogger(__name__)


@dataclass
class Generation:
    """What a generation produced.

    ``sequences`` [B, T + N] holds prompts and new tokens, padded behind a row's end; ``new_tokens`` each row's new
    tokens without padding; ``texts`` and ``completions`` each row as text, with and without its prompt. Times are in
    seconds; the first new token belongs to the prompt's. Where transformers' ``generate`` did the work, all of it
    counts as ``decode_seconds``.
    """

    sequences: Tensor
    new_tokens: list[list[int]]
    trace: Trace
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    texts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The first row as text, prompt included."""
        if not self.texts:
            raise InputError("there is no text: the model has no tokenizer; use .sequences")
        return self.texts[0]

    @property
    def completion(self) -> str:
        """The first row's new text."""
        return self.completions[0] if self.text else ""

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of all rows together, the prompt and the first new token left out."""
        count = sum(max(len(row) - 1, 0) for row in self.new_tokens)
        return count / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class DecodeOptions:
    """Options of `decode`; None takes the model's generation config's value, then transformers' default."""

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    stop_strings: str | list[str] | None = None
    streamer: Any = None
    logits_processor: Sequence[Any] | None = None
    stopping_criteria: Sequence[Any] | None = None
    seed: int | None = None


_BEYOND = frozenset(
    {
        "bad_words_ids", "begin_suppress_tokens", "constraints", "diversity_penalty", "encoder_repetition_penalty",
        "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id",
        "forced_eos_token_id", "guidance_scale", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size",
        "num_beams", "num_return_sequences", "penalty_alpha", "sequence_bias", "suppress_tokens", "top_h", "typical_p",
        "watermarking_config",
    }
)  # fmt: skip
"""Settings that change what is generated and that `decode` does not know."""
_DEFAULTS = {
    "max_new_tokens": 20, "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0,
}  # fmt: skip


@torch.no_grad()
def decode(model: AdaptiveModel, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Generation:
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
    chosen = _choose(model, options)
    if beyond := _settings_beyond(model):
        logger.warning("the generation config's %s is not followed here; generate() does", ", ".join(sorted(beyond)))
    _check_length(model, input_ids.shape[-1], chosen.max_new_tokens)
    device = model.device
    input_ids = input_ids.to(device)
    batch, length = input_ids.shape
    processors, criteria, eos = _rules(model, chosen, device)
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


def _choose(model: AdaptiveModel, options: dict[str, Any]) -> DecodeOptions:
    unknown = set(options) - set(DecodeOptions.__dataclass_fields__)
    if unknown:
        raise InputError(f"no option '{min(unknown)}'; there are: {', '.join(DecodeOptions.__dataclass_fields__)}")
    values = dict(options)
    for name in DecodeOptions.__dataclass_fields__:
        if values.get(name) is None:
            configured = getattr(model.generation_config, name, None)
            values[name] = configured if configured is not None else _DEFAULTS.get(name)
    chosen = DecodeOptions(**values)
    assert chosen.max_new_tokens is not None
    assert chosen.temperature is not None
    if not isinstance(chosen.max_new_tokens, int) or chosen.max_new_tokens < 1:
        raise InputError(f"max_new_tokens is a whole number, at least 1; got {chosen.max_new_tokens}")
    if chosen.do_sample and not chosen.temperature > 0:
        raise InputError(
            f"temperature is positive; got {chosen.temperature:g}. For greedy decoding use do_sample=False"
        )
    if chosen.top_p is not None and not 0.0 < chosen.top_p <= 1.0:
        raise InputError(f"top_p lies in (0, 1]; got {chosen.top_p:g}")
    if chosen.top_k is not None and (not isinstance(chosen.top_k, int) or chosen.top_k < 0):
        raise InputError(f"top_k is a whole number, 0 for all tokens; got {chosen.top_k}")
    if chosen.repetition_penalty is not None and not chosen.repetition_penalty > 0:
        raise InputError(f"repetition_penalty is positive, 1 for none; got {chosen.repetition_penalty:g}")
    if chosen.seed is not None and not 0 <= chosen.seed < 1 << 64:
        raise InputError(f"seed lies between 0 and 2**64 - 1; got {chosen.seed}")
    return chosen


def _rules(
    model: AdaptiveModel, chosen: DecodeOptions, device: torch.device
) -> tuple[LogitsProcessorList, StoppingCriteriaList, Tensor]:
    """Return the processors in transformers' order, the criteria, and the end-of-sequence ids."""
    processors = LogitsProcessorList()
    if chosen.repetition_penalty is not None and chosen.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(chosen.repetition_penalty))
    processors.extend(chosen.logits_processor or [])
    if chosen.do_sample:
        if chosen.temperature not in (None, 1.0):
            processors.append(TemperatureLogitsWarper(chosen.temperature))
        if chosen.top_k:
            processors.append(TopKLogitsWarper(chosen.top_k))
        if chosen.top_p is not None and chosen.top_p < 1.0:
            processors.append(TopPLogitsWarper(chosen.top_p))
    criteria = StoppingCriteriaList(list(chosen.stopping_criteria or []))
    if chosen.stop_strings:
        if model.tokenizer is None:
            raise InputError("stop_strings need a tokenizer: pass one to anee.load")
        criteria.append(StopStringCriteria(model.tokenizer, chosen.stop_strings))
    ids = chosen.eos_token_id
    eos = torch.tensor([] if ids is None else ids if isinstance(ids, list) else [ids], dtype=torch.long, device=device)
    return processors, criteria, eos


@torch.no_grad()
def generate_text(model: AdaptiveModel, prompts: str | Sequence[str], **options: Any) -> Generation:
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
    beyond = _settings_beyond(model)
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


def _settings_beyond(model: AdaptiveModel) -> frozenset[str]:
    """Return what the model's generation config sets and `decode` does not know."""
    return _BEYOND & set(model.generation_config.to_diff_dict())


def _through_transformers(
    model: AdaptiveModel, input_ids: Tensor, attention_mask: Tensor, options: dict[str, Any]
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


def _encode(model: AdaptiveModel, texts: list[str]) -> tuple[Tensor, Tensor]:
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


def _check_length(model: AdaptiveModel, prompt: int, new: int | None) -> None:
    limit = model.adapter.max_positions(model.config)
    # The last new token is not fed in again.
    if limit is not None and prompt + (new or 1) - 1 > limit:
        raise InputError(
            f"{prompt} tokens of prompt and {new} new ones do not fit the model's context of {limit}; "
            "shorten the prompt or lower max_new_tokens"
        )


def _pad_id(model: AdaptiveModel) -> int:
    tokenizer = model.tokenizer
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _label(tokenizer: Any, token: str) -> str:
    return str(tokenizer.convert_tokens_to_string([token]))
