"""`AdaptiveModel`: a causal LM like transformers' own, whose layers run only where the policy says so."""

from __future__ import annotations

import operator
import os
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from anee_core.accounting.budget import Budget
from anee_core.accounting.costs import CostModel
from anee_core.accounting.trace import Trace
from anee_core.adapter.cache_names import CACHE
from anee_core.adapter.layout import Parts, found_by
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.cache.arguments import checked_capacity
from anee_core.engine.block import Block
from anee_core.engine.bound import Terms
from anee_core.engine.engine import Engine
from anee_core.engine.pieces import Result, Wanted, run_in_pieces
from anee_core.errors import InputError
from anee_core.generation.decode import decode
from anee_core.generation.result import Generation
from anee_core.interfaces.setting import Calibration
from anee_core.model.checks import (
    Prefill,
    causal_lm,
    check_family,
    check_kept,
    check_labels,
    check_prefill,
    check_runnable,
    check_tokenizer,
    check_training,
)
from anee_core.model.context import Context
from anee_core.model.generating import Generating, with_implementation, without_implementation
from anee_core.model.inputs import Inputs, read_block
from anee_core.model.packed import Packed
from anee_core.model.recording import Recording
from anee_core.model.stand_in import StandIn
from anee_core.policy.policy import Policy, budget_of
from anee_core.ranges import check_flags, check_kind
from anee_core.steps.choice import step_for
from anee_core.steps.layer_step import LayerStep
from anee_core.steps.quantised import QUANTISED

_FOR_LOSS = {"num_items_in_batch", "shift_labels"}
"""Arguments of a forward that are the loss function's."""


class AdaptiveModel(StandIn, Generating):
    """A pretrained causal LM that runs under a policy.

    It is called and generates like the model it holds, for which it stands in: it is of that model's class, too. The
    model's modules are called as they are, never copied or patched.

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
        check_tokenizer(tokenizer)
        check_flags(fast=fast)
        self.prefill_chunk = prefill_chunk
        self.model = model
        self.adapter = adapter
        self.tokenizer = tokenizer
        self.prefill = prefill
        inner = causal_lm(model)
        check_family(inner, adapter)
        self.parts: Parts = adapter.parts(inner)
        self.name_or_path = self.config.name_or_path  # PEFT reads it where others look up attributes
        self.name: str = os.path.basename(self.config.name_or_path) or type(inner).__name__
        """What the model is called for people to read."""
        # Checkpoints may name the kind of cache that suits transformers.
        self._generation_config = without_implementation(self.parts.model.generation_config)
        check_runnable(self.parts)
        self._found = found_by(inner, self.parts.layout)
        self._context = Context(adapter, self.parts)
        self.last_trace: Trace | None = None
        self._recordings: list[Recording] = []
        self.last_ends: list[int] | None = None
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
        check_kind("policy", policy, Policy, "a Policy; names are for anee.load")
        return self.bind(policy, Terms(budget, hard, calibration))

    def bind(self, policy: Policy, terms: Terms, costs: CostModel | None = None) -> AdaptiveModel:
        """Do what `set_policy` does; ``costs`` say what the model's parts cost, if that is known already."""
        self.engine = Engine(self.adapter, self.parts, policy, terms, self._step, costs)
        self._asked = policy, terms
        return self

    def use_step(self, step: LayerStep) -> AdaptiveModel:
        """Run layers by another step from now on, under the same policy, and return the model."""
        self._step = step
        return self.bind(*self._asked, self.engine.costs)

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptiveModel:
        """Move or convert the model, as `torch.nn.Module` does for ``to`` and ``half``; its policy follows."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self._rebind()

    def _rebind(self) -> AdaptiveModel:
        """Choose the step anew for the model as it is now; its policy follows."""
        self._step = step_for(self.adapter, self.parts, self._fast)
        return self.bind(*self._asked)

    def _follow_model(self) -> None:
        """Find the model's modules again if some of those that run are no longer its own."""
        now = found_by(self.parts.model, self.parts.layout)
        if len(now) != len(self._found) or not all(map(operator.is_, now, self._found)):
            self._found = now
            self.parts = self.adapter.parts(self.parts.model)
            self._context = Context(self.adapter, self.parts)
            check_runnable(self.parts)
            self._rebind()

    def check_budget(self, policy: Policy, budget: float | None) -> None:
        """Raise `BudgetError` if a budget cannot be met under a policy, whatever calibration finds."""
        protected = policy.controller.protected(self.engine.costs.num_layers)
        Budget(self.engine.costs, protected, budget_of(policy, budget), hard=False)

    def extra_repr(self) -> str:
        """Return what is printed of this model beside the one that it holds."""
        return f"under '{self.policy}'"

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
    def config(self) -> Any:
        """The model's transformers config."""
        return self.parts.config

    @property
    def generation_config(self) -> Any:
        """How the model generates where nothing else is said. One that is assigned is the held model's, too."""
        return self._generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self._generation_config = without_implementation(config)
        self.parts.model.generation_config = config

    @property
    def device(self) -> torch.device:
        """Device of the model's first weights, where inputs go."""
        return cast(torch.device, self.parts.embedding.weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the model."""
        return cast(torch.dtype, self.parts.model.dtype)

    def new_cache(self, capacity: int | None = None) -> AdaptiveCache:
        """Return an empty cache with room for ``capacity`` tokens, if all are kept; it grows as it must."""
        self._follow_model()
        kept = checked_capacity(capacity) if self.policy.cache_policy.keeps_all else None
        return AdaptiveCache(self.engine.costs.num_layers, kept)

    # What runs depends on what the tokens are: compiled or not, it runs as it is.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
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
            position_ids: [B, T] positions for the model to encode; default: counted over the real tokens of each row.
                What a token sees goes by the order of tokens. Without mask and cache, and unless a cache is wanted,
                rows in which they restart are packed: each run of positions is a document of its own.
            past_key_values: an `AdaptiveCache`; default: a new one.
            inputs_embeds: [B, T, D] instead of ``input_ids``.
            labels: [B, T] for a loss, as in transformers.
            use_cache: whether to return the cache; default as the model's config says.
            logits_to_keep: how many last real positions of each row to return logits of; 0 for all positions. Or the
                indices [N] of positions.
            output_hidden_states: whether to return the input of every layer and the final states.
            return_dict: False for a plain tuple.
            cache: what newer versions of transformers call ``past_key_values``, in the result too.
            kwargs: ``num_items_in_batch`` and ``shift_labels`` for the loss, as transformers' ``Trainer`` gives them;
                nothing else is taken, but what transformers passes along unset is let through.

        Raises:
            InputError: the arguments do not fit together or the model.
        """
        if torch.compiler.is_compiling():
            raise InputError("an adaptive model cannot be exported: which layers run depends on the tokens")
        for_loss = {name: kwargs.pop(name) for name in _FOR_LOSS & kwargs.keys()}
        self._check_unknown(kwargs)
        output_hidden_states = self._keeps_states(output_hidden_states)
        own, keep_cache = self._own_cache(cache, past_key_values), self._keeps_cache(use_cache)
        alone = cache is None and past_key_values is None and attention_mask is None and not keep_cache
        inputs = Inputs(input_ids, attention_mask, position_ids, inputs_embeds)
        # As in transformers: what goes on in a cache is one document.
        packed = Packed.find(inputs) if alone else None
        block = self._read(inputs if packed is None else packed.apart(inputs), own)
        recording = self._recording_of(own)
        check_kept(logits_to_keep, block.position_ids.shape[1] if packed is None else packed.row.shape[1])
        places = logits_to_keep.to(self.device) if isinstance(logits_to_keep, Tensor) else None
        last = 0 if isinstance(logits_to_keep, Tensor) else logits_to_keep
        trace = self.last_trace = Trace() if recording is None else recording.trace
        found = self._run(block, own, trace, last if packed is None else 0, output_hidden_states)
        logits, states = found.logits, found.states
        if packed is not None:
            logits = packed.together(logits)[:, -last:]
            states = None if states is None else tuple(packed.together(each) for each in states)
        if places is not None:
            logits = logits[:, places]
        if recording is None:
            trace.close(own.nbytes(), own.kept())
        loss = None
        if labels is not None:
            check_labels(labels, logits)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **for_loss)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=states, **{CACHE: own if keep_cache else None}
        )
        return result.to_tuple() if return_dict is False else result

    def check_fits(self, length: int) -> None:
        """Raise `InputError` if the model has no position for the last token of a row of ``length``."""
        self._follow_model()
        self._context.refuse_beyond(length)

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor | None, cache: AdaptiveCache) -> Tensor:
        """Return the logits [B, 1, V] after each row's last real token of [B, T], and nothing else that `forward` does.

        ``cache`` is one that is being recorded.
        """
        block = self._read(Inputs(input_ids, attention_mask), cache)
        recording = self._recording_of(cache)
        assert recording is not None
        self.last_trace = recording.trace
        return self._run(block, cache, recording.trace).logits

    def _keeps_states(self, asked: bool | None) -> bool:
        """Whether hidden states are returned; the config's switches count as in transformers."""
        if getattr(self.config, "output_attentions", False):
            raise InputError("attention weights cannot be returned: set config.output_attentions to False")
        if asked is not None and not isinstance(asked, bool):
            raise InputError(f"output_hidden_states is True, for those of all layers, or False; got {asked}")
        return bool(getattr(self.config, "output_hidden_states", False)) if asked is None else asked

    def _keeps_cache(self, asked: bool | None) -> bool:
        """Whether the cache is returned."""
        wanted = bool(getattr(self.config, "use_cache", True) if asked is None else asked)
        return wanted and not self.parts.checkpoints_gradients

    @staticmethod
    def _check_unknown(kwargs: dict[str, Any]) -> None:
        """Raise `InputError` for an argument that nothing here follows."""
        # transformers' generate hands its tokenizer, for stop strings, on to the model.
        given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        unknown = [name for name in given if name != "tokenizer"]
        if unknown:
            raise InputError(f"this model takes no '{unknown[0]}'; see AdaptiveModel.forward for what it takes")

    def _read(self, inputs: Inputs, cache: AdaptiveCache) -> Block:
        self._follow_model()
        check_training(self.parts)
        if len(cache.layers) != self.engine.costs.num_layers:
            raise InputError(
                f"the cache is for {len(cache.layers)} layers and the model has {self.engine.costs.num_layers}: "
                "start from model.new_cache()"
            )
        recording = self._recording_of(cache)
        given = inputs.input_ids if inputs.input_ids is not None else inputs.inputs_embeds
        ends = cache.seen == 0
        if recording is not None and given is not None and given.dim() > 1:
            ends = recording.prompt_ends_among(given.shape[1])
        return read_block(self.parts, inputs, cache, self._context, ends)

    def _run(self, block: Block, cache: AdaptiveCache, trace: Trace, last: int = 1, states: bool = False) -> Result:
        """Run a block; the arguments are those of `Wanted`."""
        recording = self._recording_of(cache)
        dense = 0 if recording is None else recording.dense_among(block.position_ids.shape[1])
        return run_in_pieces(self.engine, block, cache, trace, Wanted(dense, self.prefill_chunk, last, states))

    def decode(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Generation:
        """Generate with the lean loop; see `anee_core.generation.decode.decode`."""
        return decode(self, input_ids, attention_mask, **options)

    def save_pretrained(self, folder: str, **kwargs: Any) -> None:
        """Save the wrapped model with the generation config in force, as transformers does.

        A policy is saved by ``model.policy.save(folder)``.

        Raises:
            InputError: its weights were quantised when it was loaded: transformers could not read them.
        """
        if any(isinstance(module, tuple(QUANTISED.values())) for module in self.model.modules()):
            raise InputError(
                "the layers were quantised when the model was loaded, and transformers cannot read that: load it "
                "without weights=..., and save that; quantising takes seconds"
            )
        # What the checkpoint says of a kind of cache is nothing to ANEE, and stays in it.
        self.parts.model.generation_config = with_implementation(self.generation_config, self.parts.model)
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
