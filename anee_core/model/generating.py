"""Generation as transformers does it, on a cache of the model's own and with one trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation import GenerationMixin

from anee_core.accounting.trace import Trace
from anee_core.adapter.cache_names import CACHE, one_cache
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.errors import InputError
from anee_core.generation.options import check_settings
from anee_core.generation.prompts import check_mask
from anee_core.generation.text import generate_text
from anee_core.model.checks import Prefill
from anee_core.model.recording import Recording
from anee_core.policy.policy import Policy


class Generating(GenerationMixin):  # type: ignore[misc]  # transformers ships without types
    """What `AdaptiveModel` adds to transformers' ``generate``."""

    main_input_name = "input_ids"
    _is_stateful = False
    prefill: Prefill
    """How a prompt is read."""
    last_trace: Trace | None
    """Record of the last call; None before the first."""
    last_ends: list[int] | None
    """Tokens of each row when it ended, in the last call of transformers' ``generate``; None if beams were searched."""
    _recordings: list[Recording]

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        raise NotImplementedError

    @classmethod
    def can_generate(cls) -> bool:
        """Return True (transformers asks)."""
        return True

    def new_cache(self, capacity: int | None = None) -> AdaptiveCache:
        """Return an empty cache with room for ``capacity`` tokens."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(self, inputs: Any = None, **kwargs: Any) -> Any:
        """Generate from text or from token ids.

        With text (a string, a chat, or a list of these) it returns a `Generation`, with ``text`` and ``trace``; options
        are those of `decode`, or any of transformers' ``generate``. With token ids (a tensor or array [B, T], or what a
        tokenizer returns) it is transformers' own ``generate`` and returns what that returns.

        Raises:
            InputError: an empty prompt, one longer than the model's context, or an option that does not exist.
        """
        if isinstance(inputs, (str, Sequence)):
            return generate_text(self, inputs, **kwargs)
        inputs, kwargs = _token_ids(inputs, kwargs)
        check_settings(kwargs)
        kwargs = _kind_of_cache_apart(kwargs)
        if not self._caches(kwargs):
            return super().generate(inputs, **kwargs)
        given = kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None
        cache = kwargs[CACHE] = self._own_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
        if not given and ids is not None and mask is not None:
            check_mask(mask, ids)
        if getattr(kwargs.get("generation_config"), "is_assistant", False):
            # What it drafts now may be taken back before the next call; what came before was accepted.
            cache.accept()
            cache.activate_past_recording()
        with self.recording(cache, _prompt_length(inputs, kwargs)):
            return super().generate(inputs, **kwargs)

    def _caches(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a generation is to use a cache: the arguments say so, else the config given, else the model's."""
        configs = (kwargs.get("generation_config"), self.generation_config)
        said = [kwargs.get("use_cache"), *(getattr(config, "use_cache", None) for config in configs)]
        return bool(next((answer for answer in said if answer is not None), True))

    def _own_cache(self, cache: Any, past_key_values: Any) -> AdaptiveCache:
        """Return the cache that was given under either name, or a new one in place of none.

        Raises:
            InputError: it is no cache of ANEE's.
        """
        given = one_cache(cache, past_key_values)
        if given is not None and not isinstance(given, AdaptiveCache):
            raise InputError(
                f"a {type(given).__name__} cannot be used, not even an empty one: start from model.new_cache() and "
                "feed the tokens"
            )
        return self.new_cache() if given is None else given

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> None:
        """Leave positions to `forward`, which counts real tokens: transformers counts padding on the right as well."""

    @contextmanager
    def recording(self, cache: AdaptiveCache, prompt: int = 0) -> Iterator[Trace]:
        """Gather all forwards on ``cache`` in one trace.

        The first ``prompt`` tokens of the sequence are read as `prefill_mode` says, in however many pieces they come. A
        copy of the cache is not recorded.
        """
        recording = Recording(cache, Trace(), prompt, self.prefill_mode == "dense")
        self._recordings.append(recording)
        try:
            yield recording.trace
        finally:
            self._recordings.remove(recording)
            cache.keeps_dropped = False
            self.last_trace = recording.trace  # whatever else ran meanwhile, such as an unguided prompt
            recording.trace.close(cache.nbytes(), cache.kept())

    def _recording_of(self, cache: AdaptiveCache) -> Recording | None:
        """Return the innermost recording of a cache, if there is one."""
        return next((each for each in reversed(self._recordings) if each.cache is cache), None)

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """Return transformers' criteria, which note here when each row ends."""
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        self.last_ends = None
        return criteria if generation_config.num_beams > 1 else _Noting(criteria, self)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse transformers' continuous batching, which has a cache of its own.

        Raises:
            InputError: always.
        """
        raise InputError("transformers' continuous batching does not work with ANEE's cache: generate from a batch")

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, as `generate_batch` does."""
        return self.generate_batch()

    @property
    def prefill_mode(self) -> Prefill:
        """How a prompt is read by `generate`: ``"adaptive"`` or ``"dense"``."""
        if self.prefill == "auto":
            return "dense" if self.policy.feeds_back else "adaptive"
        return self.prefill


class _Noting(StoppingCriteriaList):  # type: ignore[misc]
    """Criteria that note how many tokens each row had when it ended: what transformers appends to it is padding."""

    def __init__(self, criteria: StoppingCriteriaList, model: Generating) -> None:
        super().__init__(criteria)
        self._model = model

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done: Tensor = super().__call__(input_ids, scores, **kwargs)
        known = self._model.last_ends or [0] * len(done)
        length = input_ids.shape[1]
        self._model.last_ends = [end or (length if now else 0) for end, now in zip(known, done.tolist(), strict=True)]
        return done


def _token_ids(inputs: Any, kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """Return token ids as a tensor, and the other arguments; what a tokenizer returns is taken apart."""
    if isinstance(inputs, Mapping):
        inputs, kwargs = None, {**inputs, **kwargs}
    elif inputs is not None and not isinstance(inputs, Tensor):
        try:
            inputs = torch.as_tensor(inputs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"inputs are text or token ids [batch, tokens]; got {type(inputs).__name__}") from error
    for ids in (inputs, kwargs.get("input_ids")):
        if ids is not None and ids.dim() != 2:
            raise InputError(f"token ids are [batch, tokens], so [1, tokens] for one row; got {tuple(ids.shape)}")
    return inputs, kwargs


def _kind_of_cache_apart(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments without the kind of cache, which is ANEE's own.

    Raises:
        InputError: a kind was asked for that would make a difference.
    """
    config = kwargs.get("generation_config")
    asked = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
    if asked is None:
        return kwargs
    if not str(asked).startswith("dynamic"):
        raise InputError(f"cache_implementation '{asked}' cannot be chosen: ANEE brings its own cache")
    kwargs = {name: value for name, value in kwargs.items() if name != "cache_implementation"}
    if config is not None:
        kwargs["generation_config"] = without_implementation(config)
    return kwargs


def without_implementation(config: Any) -> Any:
    """Return a generation config that asks for no kind of cache; itself if it asks for none."""
    if getattr(config, "cache_implementation", None) is None:
        return config
    config = copy.copy(config)
    config.cache_implementation = None
    return config


def with_implementation(config: Any, network: Any) -> Any:
    """Return a generation config that asks for the kind of cache that a transformers model's own asks for."""
    named = getattr(network.generation_config, "cache_implementation", None)
    if named is None or getattr(config, "cache_implementation", None) is not None:
        return config
    config = copy.copy(config)
    config.cache_implementation = named
    return config


def _prompt_length(inputs: Tensor | None, kwargs: Mapping[str, Any]) -> int:
    """Return the number of tokens that `generate` is given; 1 if it begins with one of its own."""
    given = [inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    return max((tensor.shape[1] for tensor in given if tensor is not None and tensor.dim() > 1), default=0) or 1
