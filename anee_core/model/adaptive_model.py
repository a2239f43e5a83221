"""`AdaptiveModel`: a causal LM like transformers' own, whose layers run only where the policy says so."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from anee_core.accounting.budget import Budget
from anee_core.accounting.trace import Trace
from anee_core.adapter.cache_names import CACHE, one_cache
from anee_core.adapter.layout import Parts
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.engine.block import Block
from anee_core.engine.bound import Terms
from anee_core.engine.engine import Engine, Output
from anee_core.errors import InputError
from anee_core.generation.decode import decode
from anee_core.generation.result import Generation
from anee_core.generation.text import generate_text
from anee_core.interfaces.setting import Calibration
from anee_core.model.checks import Prefill, causal_lm, check_family, check_prefill, check_runnable
from anee_core.model.inputs import Inputs, read_block
from anee_core.model.recording import Recording
from anee_core.policy.policy import Policy, budget_of
from anee_core.steps.choice import step_for
from anee_core.steps.layer_step import LayerStep
from anee_core.steps.quantised import QUANTISED


class AdaptiveModel(nn.Module, GenerationMixin):  # type: ignore[misc]  # transformers ships without types
    """A pretrained causal LM that runs under a policy.

    It is called and generates like the model it holds; attributes it lacks are looked up there. The model's modules
    are called as they are, never copied or patched.

    Args:
        model: a transformers causal LM, plain, quantised, or wrapped by PEFT.
        adapter: the adapter of its family.
        tokenizer: for `generate` with text; may be None.
        prefill: how `generate` reads the prompt. ``"adaptive"``: under the policy. ``"dense"``: with all layers.
            ``"auto"``: under the policy, unless that would have to go token by token.
        prefill_chunk: tokens of a prompt that are read at once under a policy that drops tokens: the cache never holds
            more than these and what is kept of those before.
        fast: whether layers may run by a faster step than the model's own modules, within rounding of it.

    Raises:
        ModelError: the adapter refuses the model's config, or the model cannot be run.
    """

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(
        self,
        model: nn.Module,
        adapter: ModelAdapter,
        tokenizer: Any = None,
        prefill: Prefill = "auto",
        prefill_chunk: int = 256,
        fast: bool = False,
    ) -> None:
        super().__init__()
        check_prefill(prefill, prefill_chunk)
        self.prefill_chunk = prefill_chunk
        self.model = model
        self.adapter = adapter
        self.tokenizer = tokenizer
        self.prefill = prefill
        inner = causal_lm(model)
        check_family(inner, adapter)
        self.parts: Parts = adapter.parts(inner)
        self.config = self.parts.config
        self.name: str = os.path.basename(self.config.name_or_path) or type(inner).__name__
        """What the model is called for people to read."""
        self.generation_config = self.parts.model.generation_config
        check_runnable(self.parts)
        self.last_trace: Trace | None = None
        self._recordings: list[Recording] = []
        self._fast, self._step = fast, step_for(adapter, self.parts, fast)
        self.set_policy(Policy())
        self.training = model.training

    def set_policy(
        self, policy: Policy, budget: float | None = None, hard: bool = False, calibration: Calibration | None = None
    ) -> AdaptiveModel:
        """Run under another policy from now on, and return the model.

        Args:
            policy: what decides.
            budget: share of the dense decoder-layer FLOPs that may be spent, in (0, 1]; None for the policy's default.
            hard: whether no token may exceed the budget; otherwise it holds on average.
            calibration: of this model, for policies that need one.

        Raises:
            PolicyError, BudgetError: policy, budget and model do not fit together.
        """
        terms = Terms(budget, hard, calibration)
        self.engine = Engine(self.adapter, self.parts, policy, terms, self._step)
        self._asked = policy, terms
        return self

    def use_step(self, step: LayerStep) -> AdaptiveModel:
        """Run layers by another step from now on, under the same policy, and return the model."""
        self._step = step
        policy, terms = self._asked
        self.engine = Engine(self.adapter, self.parts, policy, terms, step, self.engine.costs)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptiveModel:
        """Move or convert the model, as `torch.nn.Module` does for ``to`` and ``half``; its policy follows."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._step = step_for(self.adapter, self.parts, self._fast)
        policy, terms = self._asked
        return self.set_policy(policy, terms.budget, terms.hard, terms.calibration)

    def check_budget(self, policy: Policy, budget: float | None) -> None:
        """Raise `BudgetError` if a budget cannot be met under a policy, whatever calibration finds."""
        protected = policy.controller.protected(self.engine.costs.num_layers)
        Budget(self.engine.costs, protected, budget_of(policy, budget), hard=False)

    @property
    def policy(self) -> Policy:
        """The policy in force, bound to the model."""
        return self.engine.policy

    @property
    def budget(self) -> float | None:
        """The budget in force."""
        return self.engine.budget.limit

    @property
    def slow_because(self) -> str | None:
        """Why layers run by their own modules, though they might run faster; None if they do run fast.

        It is known once a block of a few tokens has been run without gradients.
        """
        return self.engine.step.slow_because

    @property
    def device(self) -> torch.device:
        """Device of the model's first weights, where inputs go."""
        return cast(torch.device, self.parts.embedding.weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the model."""
        return cast(torch.dtype, self.parts.model.dtype)

    def __getattr__(self, name: str) -> Any:
        """Look up what this class lacks in the wrapped model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "parts") or name.startswith("__"):
                raise
            return getattr(self.parts.model, name)

    @classmethod
    def can_generate(cls) -> bool:
        """Return True (transformers asks)."""
        return True

    def new_cache(self, capacity: int | None = None) -> AdaptiveCache:
        """Return an empty cache with room for ``capacity`` tokens, if all are kept; it grows as it must."""
        kept = capacity if self.policy.cache_policy.keeps_all else None
        return AdaptiveCache(self.engine.costs.num_layers, kept)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run tokens through the model under the policy; it takes many parameters because transformers' models do.

        Args:
            input_ids: [B, T] new tokens.
            attention_mask: [B, S + T] for S tokens seen before, 0 for padding on either side; [B, T] is taken as the
                new tokens' part.
            position_ids: [B, T]; default: counted over the real tokens of each row.
            past_key_values: an `AdaptiveCache`; default: a new one.
            inputs_embeds: [B, T, D] instead of ``input_ids``.
            labels: [B, T] for a loss, as in transformers.
            use_cache: whether to return the cache; default as the model's config says.
            logits_to_keep: how many last positions to compute logits for; 0 for all. With 1, each row's last real
                token.
            output_hidden_states: whether to return the input of every layer and the final states.
            return_dict: False for a plain tuple.
            cache: what newer versions of transformers call ``past_key_values``, in the result too.
            kwargs: nothing else is taken; what transformers passes along unset is let through.

        Raises:
            InputError: the arguments do not fit together or the model.
        """
        self._check_unknown(kwargs)
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise InputError("logits_to_keep takes a number of last positions, 0 for all")
        cache = self._own_cache(one_cache(cache, past_key_values))
        block = self._read(Inputs(input_ids, attention_mask, position_ids, inputs_embeds), cache)
        recording = self._recording_of(cache)
        trace = self.last_trace = Trace() if recording is None else recording.trace
        logits, outputs = self._run(block, cache, logits_to_keep, trace, bool(output_hidden_states))
        if recording is None:
            trace.close(cache.nbytes(), cache.kept())
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        keep_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=_join_states(outputs) if output_hidden_states else None,
            **{CACHE: cache if keep_cache else None},
        )
        return result.to_tuple() if return_dict is False else result

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor | None, cache: AdaptiveCache) -> Tensor:
        """Return the logits [B, 1, V] after each row's last real token of [B, T], and nothing else that `forward` does.

        ``cache`` is one that is being recorded.
        """
        block = self._read(Inputs(input_ids, attention_mask), cache)
        recording = self._recording_of(cache)
        assert recording is not None
        self.last_trace = recording.trace
        return self._run(block, cache, 1, recording.trace, False)[0]

    @staticmethod
    def _check_unknown(kwargs: dict[str, Any]) -> None:
        """Raise `InputError` for an argument that nothing here follows."""
        # transformers' generate hands its tokenizer, for stop strings, on to the model.
        given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        unknown = [name for name in given if name != "tokenizer"]
        if unknown:
            raise InputError(f"this model takes no '{unknown[0]}'; see AdaptiveModel.forward for what it takes")

    def _own_cache(self, given: Cache | None) -> AdaptiveCache:
        """Return the cache that was given, or a new one in place of none or of an empty one of transformers."""
        cache = given if isinstance(given, AdaptiveCache) else self.new_cache()
        if given is not None and cache is not given and given.get_seq_length() > 0:
            raise InputError(
                f"a filled {type(given).__name__} cannot be used: start from model.new_cache() and feed the tokens"
            )
        return cache

    def _read(self, inputs: Inputs, cache: AdaptiveCache) -> Block:
        if len(cache.layers) != self.engine.costs.num_layers:
            raise InputError(
                f"the cache is for {len(cache.layers)} layers and the model has {self.engine.costs.num_layers}: "
                "start from model.new_cache()"
            )
        return read_block(self.parts, inputs, cache, self.adapter.position_limit(self.parts))

    def _run(
        self, block: Block, cache: AdaptiveCache, keep: int, trace: Trace, keep_inputs: bool
    ) -> tuple[Tensor, list[Output]]:
        """Run a block in as few pieces as the policy allows, and return logits and outputs."""
        engine, recording = self.engine, self._recording_of(cache)
        tokens = block.position_ids.shape[1]
        dense = recording is not None and recording.reads_densely()
        blocks = block.split(self._block_length(cache, dense) or tokens)
        outputs: list[Output] = []
        logits: list[Tensor] = []
        for part in blocks:
            output = engine.run(part, cache, trace, dense, keep_inputs)
            outputs.append(output)
            if engine.policy.feeds_back:
                last = engine.logits(_last_real(output.hidden_states, part.real), trace)
                engine.feed_back(part, cache, output, last[:, -1])
                logits.append(last)
        if logits and (len(blocks) == tokens or (keep == 1 and len(blocks) == 1)):
            known = torch.cat(logits, dim=1)
            return _last_real(known, block.real) if keep == 1 else known[:, -keep:], outputs
        parts = [output.hidden_states for output in outputs]
        hidden_states = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        wanted = _last_real(hidden_states, block.real) if keep == 1 else hidden_states[:, -keep:]
        return engine.logits(wanted, trace), outputs

    def _block_length(self, cache: AdaptiveCache, dense: bool) -> int | None:
        """Return how many tokens to run at once; None for all."""
        policy = self.engine.policy
        if policy.feeds_back and not dense:
            return 1
        if policy.cache_policy.keeps_all:
            return None
        # What a policy rewrites can be restored at the end of a block only.
        return 1 if cache.keeps_dropped and policy.cache_policy.rewrites else self.prefill_chunk

    @torch.no_grad()
    def generate(self, inputs: Any = None, **kwargs: Any) -> Any:
        """Generate from text or from token ids.

        With text (a string or a list of strings) it returns a `Generation`, with ``text`` and ``trace``; options are
        those of `decode`, or any of transformers' ``generate``. With token ids it is transformers' own ``generate``
        and returns what that returns.

        Raises:
            InputError: an empty prompt, one longer than the model's context, or an option that does not exist.
        """
        if isinstance(inputs, (str, Sequence)):
            return generate_text(self, inputs, **kwargs)
        if kwargs.get("cache_implementation") is not None:
            raise InputError("cache_implementation cannot be chosen: ANEE brings its own cache")
        if kwargs.get("use_cache") is False:
            return super().generate(inputs, **kwargs)
        given = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        cache = kwargs[CACHE] = self.new_cache() if given is None else given
        if not isinstance(cache, AdaptiveCache):
            raise InputError(f"the cache is one from model.new_cache(); got {type(cache).__name__}")
        with self.recording(cache):
            return super().generate(inputs, **kwargs)

    @contextmanager
    def recording(self, cache: AdaptiveCache, prompt: bool = True) -> Iterator[Trace]:
        """Gather all forwards on ``cache`` in one trace.

        The first of them reads a ``prompt`` as `prefill_mode` says, unless there is none. A copy of the cache is not
        recorded.
        """
        recording = Recording(cache, Trace(), prompt and self.prefill_mode == "dense")
        self._recordings.append(recording)
        try:
            yield recording.trace
        finally:
            self._recordings.remove(recording)
            cache.keeps_dropped = False
            recording.trace.close(cache.nbytes(), cache.kept())

    def _recording_of(self, cache: AdaptiveCache) -> Recording | None:
        """Return the innermost recording of a cache, if there is one."""
        return next((each for each in reversed(self._recordings) if each.cache is cache), None)

    def decode(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Generation:
        """Generate with the lean loop; see `anee_core.generation.decode.decode`."""
        return decode(self, input_ids, attention_mask, **options)

    @property
    def prefill_mode(self) -> Prefill:
        """How a prompt is read by `generate`: ``"adaptive"`` or ``"dense"``."""
        if self.prefill == "auto":
            return "dense" if self.policy.feeds_back else "adaptive"
        return self.prefill

    def save_pretrained(self, folder: str, **kwargs: Any) -> None:
        """Save the wrapped model, as transformers does. A policy is saved by ``model.policy.save(folder)``.

        Raises:
            InputError: its weights were quantised when it was loaded: transformers could not read them.
        """
        if any(isinstance(module, tuple(QUANTISED.values())) for module in self.model.modules()):
            raise InputError(
                "the layers were quantised when the model was loaded, and transformers cannot read that: load it "
                "without weights=..., and save that; quantising takes seconds"
            )
        cast(Any, self.model).save_pretrained(folder, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: model and policy go to the hub each by itself.

        Raises:
            InputError: always.
        """
        raise InputError(
            "a policy goes to the hub by `anee publish MODEL --policy POLICY --to OWNER/NAME --push`, "
            "the model's own weights by model.model.push_to_hub(...)"
        )


def _last_real(states: Tensor, real: Tensor | None) -> Tensor:
    """Return each row's last real position of [B, T, ...], as [B, 1, ...]; the last one where a row has none."""
    if real is None or states.shape[1] == 1:
        return states[:, -1:]
    columns = torch.arange(1, real.shape[1] + 1, device=real.device) * real
    last = torch.where(columns.amax(1) > 0, columns.amax(1) - 1, real.shape[1] - 1)
    return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[-1]))


def _join_states(outputs: list[Output]) -> tuple[Tensor, ...]:
    """Return the input of every layer and the final states, each [B, T, D], of pieces of one block."""
    stacks = [(*output.inputs, output.hidden_states) for output in outputs]
    return tuple(torch.cat(parts, dim=1) for parts in zip(*stacks, strict=True))
