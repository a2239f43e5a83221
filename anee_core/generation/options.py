"""Options of the lean decode loop, and the rules that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from anee_core.errors import InputError
from anee_core.generation.decodable import Decodable
from anee_core.generation.rows import Rows
from anee_core.ranges import (
    COARSEST,
    MOST,
    Count,
    CountOrNone,
    SomeShare,
    TorchSeed,
    Within,
    check_flags,
    check_kind,
    check_values,
)

_GREEDY = "a number, at least 1e-20 and at most 1e+20; for greedy decoding use do_sample=False"
TokenId = Annotated[int, Within(-1, MOST)]


@dataclass(frozen=True)
class DecodeOptions:
    """Options of `decode`; None takes the model's generation config's value, then transformers' default."""

    max_new_tokens: Count | None = None
    """How many tokens a row may get."""
    do_sample: bool | None = None
    """Whether to draw tokens; otherwise the likeliest one is taken."""
    temperature: Annotated[float, Within(1e-20, 1e20, whole=False, told=_GREEDY)] | None = None
    """Temperature of the draw, above 0."""
    top_k: CountOrNone | None = None
    """How many of the likeliest tokens to draw from; 0 for all."""
    top_p: SomeShare | None = None
    """Probability that the likeliest tokens to draw from have together, in (0, 1]."""
    repetition_penalty: Annotated[float, Within(1e-6, 1e6, whole=False)] | None = None
    """Factor by which tokens that a row holds already become less likely; 1 for none."""
    eos_token_id: TokenId | list[TokenId] | None = None
    """Ids of the tokens that end a row."""
    pad_token_id: TokenId | None = None
    """Id that stands behind a row's end."""
    stop_strings: str | list[str] | None = None
    """Texts that end a row."""
    max_time: Annotated[float, Within(0, COARSEST, whole=False)] | None = None
    """Seconds after which rows end."""
    streamer: Any = None
    """Object that gets the prompts and then each token, as in transformers."""
    logits_processor: Sequence[Any] | None = None
    """Further processors of the logits, as in transformers."""
    stopping_criteria: Sequence[Any] | None = None
    """Further criteria that end rows, as in transformers."""
    seed: TorchSeed | None = None
    """Seed of this call's sampling; None to go on with torch's own random state."""


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


def choose_options(model: Decodable, options: dict[str, Any], prompt: int) -> DecodeOptions:
    """Return the options, those that were left out as the model's generation config or transformers has them.

    Raises:
        InputError: an option is unknown or out of range, or the prompt's ``prompt`` tokens leave no room.
    """
    unknown = set(options) - set(DecodeOptions.__dataclass_fields__)
    if unknown:
        raise InputError(f"no option '{min(unknown)}'; there are: {', '.join(DecodeOptions.__dataclass_fields__)}")
    values = dict(options)
    config = model.generation_config
    longest = config.to_diff_dict().get("max_length")
    if longest is not None and options.get("max_new_tokens") is None and config.max_new_tokens is None:
        if longest <= prompt:
            raise InputError(
                f"the generation config's max_length is {longest} and the prompt has {prompt} tokens: "
                "set max_new_tokens"
            )
        values["max_new_tokens"] = longest - prompt
    for name in DecodeOptions.__dataclass_fields__:
        if values.get(name) is None:
            configured = getattr(config, name, None)
            values[name] = configured if configured is not None else _DEFAULTS.get(name)
    check_flags(do_sample=values["do_sample"])
    _check_kinds(values)
    # A temperature does not matter without draws, and many a config says 0 then.
    looked_at = {name: value for name, value in values.items() if name != "temperature" or values["do_sample"]}
    check_values(DecodeOptions, looked_at, str)
    return DecodeOptions(**values)


def _check_kinds(values: dict[str, Any]) -> None:
    """Raise `InputError` for an option that is no number and not what its name says."""
    streamer, stops = values["streamer"], values["stop_strings"]
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise InputError(f"streamer is one of transformers; got {type(streamer).__name__}")
    texts = stops if isinstance(stops, (list, tuple)) else [stops]
    if stops is not None and not all(isinstance(text, str) for text in texts):
        raise InputError(f"stop_strings is a text or a list of texts; got {stops!r}")
    for name in ("logits_processor", "stopping_criteria"):
        given = values[name]
        if given is not None and not (isinstance(given, (list, tuple)) and all(callable(each) for each in given)):
            raise InputError(f"{name} is a list of transformers' own or of functions; got {given!r}")


@dataclass(frozen=True)
class Rules:
    """How next tokens are drawn, and what ends a row."""

    processors: LogitsProcessorList
    """Processors of the scores, in transformers' order."""
    criteria: StoppingCriteriaList
    """What ends a row beside the end-of-sequence ids."""
    eos: Tensor
    """End-of-sequence ids."""
    pad: int
    """Id that stands behind a row's end."""
    do_sample: bool
    """Whether tokens are drawn; otherwise the likeliest one is taken."""
    generator: torch.Generator | None
    """Source of the draws; None for torch's own."""

    def process(self, rows: Rows, scores: Tensor) -> Tensor:
        """Return the scores [R, V] of the next tokens as they are drawn from."""
        return self.processors(rows.tokens, scores) if self.processors else scores

    def draw(self, scores: Tensor) -> Tensor:
        """Return one token id for each row of scores [R, V]."""
        if not self.do_sample:
            # numpy's takes a tenth of the time of torch's on the CPU, over the last dimension.
            return torch.from_numpy(scores.numpy().argmax(-1)) if scores.is_cpu else scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[:, 0]

    def over(self, rows: Rows, token: Tensor, scores: Tensor) -> Tensor:
        """Return which rows end with their newest ``token`` [R], [R] bool."""
        over = torch.isin(token, self.eos)
        return over | self.criteria(rows.tokens, scores) if self.criteria else over


def decode_rules(model: Decodable, chosen: DecodeOptions) -> Rules:
    """Return the rules that follow from the options.

    Raises:
        InputError: they need a tokenizer, and the model has none.
    """
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
    if chosen.max_time is not None:
        criteria.append(MaxTimeCriteria(chosen.max_time))
    ids, device = chosen.eos_token_id, model.device
    ends = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return Rules(
        processors,
        criteria,
        torch.tensor(ends, dtype=torch.long, device=device),
        chosen.pad_token_id if chosen.pad_token_id is not None else int(ends[0]) if ends else 0,
        bool(chosen.do_sample),
        None if chosen.seed is None else torch.Generator(device).manual_seed(chosen.seed),
    )


def settings_beyond(model: Decodable) -> frozenset[str]:
    """Return what the model's generation config sets and `decode` does not know."""
    return _BEYOND & set(model.generation_config.to_diff_dict())


def check_settings(options: dict[str, Any]) -> None:
    """Raise `InputError` for options of transformers' ``generate`` that it would not refuse in words."""
    config = options.get("generation_config")
    if config is not None:
        check_kind("generation_config", config, GenerationConfig, "a GenerationConfig")
    for name in ("num_beams", "num_return_sequences"):
        if options.get(name) is not None:
            Within(1, MOST).check(name, options[name])
