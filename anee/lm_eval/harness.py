"""An ANEE model for lm-eval (`lm_eval --model anee --model_args pretrained=...,policy=...`), as it is deployed."""

from __future__ import annotations

import inspect
import logging
from typing import Any, Literal, get_args

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from anee_core.errors import InputError, suggestion
from anee_core.model import AdaptiveModel

logger = logging.getLogger(__name__)

Mode = Literal["parallel", "decode"]
_FIGURES = ("budget spent", "context kept", "FLOPs", "weight bytes", "KV bytes")


@register_model("anee")
class AneeLM(HFLM):  # type: ignore[misc]
    """A model that scores and generates under a policy, and counts what that took.

    It takes many parameters because lm-eval hands over what its command line is given, one by one.

    Args:
        pretrained: whatever `anee.load` takes, or an `AdaptiveModel`.
        policy: a policy string.
        budget: share of the dense decoder-layer FLOPs that may be spent.
        hard: whether no token may exceed the budget.
        weights: quantisation of the layers' weights, as for `anee.load`.
        mode: ``"parallel"`` scores a text in one forward, ``"decode"`` token by token with a cache, slowly, for audits.
            The promise "parallel equals stepwise" makes them the same.
        dtype: of the model, as for `anee.load`.
        device: where to run.
        options: lm-eval's for its "hf" model: ``batch_size``, ``max_length``, ``add_bos_token`` ...

    Raises:
        InputError: an unknown mode or option, or a policy beside a model that has one already.
        AneeError: the model cannot be loaded under the policy.
    """

    def __init__(
        self,
        pretrained: str | AdaptiveModel,
        policy: str | None = None,
        budget: float | None = None,
        hard: bool = False,
        weights: str | None = None,
        mode: Mode = "parallel",
        dtype: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        from anee_core.load import load

        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            # What lm-eval's command line says where nobody names a device; its own models take what is there.
            logger.info("there is no GPU for '%s': the model stays where it is", device)
            device = None
        if mode not in get_args(Mode):
            raise InputError(f"mode is {' or '.join(get_args(Mode))}; got '{mode}'")
        known = set(inspect.signature(HFLM.__init__).parameters) - {"self", "pretrained", "tokenizer", "backend"}
        # lm-eval takes any others for the model's, and a ready model drops them.
        if unknown := set(options) - known:
            name = min(unknown)
            if policy is not None and ":" in policy:
                # lm-eval splits its model_args at every comma.
                raise InputError(
                    f"no option '{name}'; if it is the policy's, give the model_args as JSON: "
                    f"""'{{"pretrained": "{pretrained}", "policy": "{policy},{name}={options[name]}"}}'"""
                )
            raise InputError(f"no option '{name}'; {suggestion(name, known)}")
        wanted = {
            "policy": policy,
            "budget": budget,
            "hard": hard,
            "weights": weights,
            "dtype": dtype,
            "device": device,
        }
        if not isinstance(pretrained, AdaptiveModel):
            wanted["budget"] = None if budget is None else float(budget)
            wanted["dtype"] = None if dtype == "auto" else dtype
            pretrained = load(pretrained, **wanted)  # type: ignore[arg-type]
        elif given := [name for name, value in wanted.items() if value]:
            raise InputError(
                f"{given[0]} is for a model that is to be loaded; this one is, under '{pretrained.policy}'"
            )
        if pretrained.tokenizer is None:
            raise InputError("lm-eval reads text: the model needs a tokenizer")
        self.mode = mode
        self.start_counting()
        super().__init__(pretrained=pretrained, tokenizer=pretrained.tokenizer, backend="causal", **options)

    def start_counting(self) -> None:
        """Let `spent` begin anew."""
        self._tokens = 0
        self._sums: dict[str, float] = dict.fromkeys(_FIGURES, 0.0)

    def spent(self) -> dict[str, float]:
        """Return what was spent, on average over all tokens since counting began.

        That is the share of the dense decoder-layer FLOPs spent, the share of the context that layers held, FLOPs,
        bytes of weights read, and bytes that keys and values took at the end of the token's batch. Weights are read
        once for all tokens of a forward: they tell what decoding reads in the mode "decode" alone.
        """
        return {name: total / max(self._tokens, 1) for name, total in self._sums.items()}

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return logits [B, T, V] of token ids [B, T]; rows are padded with zeros on the right, which no token sees."""
        model = self.model
        with torch.inference_mode():
            if self.mode == "parallel":
                logits: Tensor = model(inps, use_cache=False).logits
            else:
                cache = model.new_cache(inps.shape[1])
                with model.recording(cache, prompt=0):
                    steps = [model(column, past_key_values=cache).logits for column in torch.split(inps, 1, dim=1)]
                logits = torch.cat(steps, dim=1)
        self._count(inps.numel())
        return logits

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        tokens: Tensor = super()._model_generate(*args, **kwargs)
        self._count(tokens.numel())
        return tokens

    def _count(self, tokens: int) -> None:
        trace = self.model.last_trace
        assert trace is not None
        self._tokens += tokens
        self._sums["budget spent"] += tokens * trace.budget_spent
        self._sums["context kept"] += tokens * (1 - trace.context_dropped)
        self._sums["FLOPs"] += trace.flops["spent"]
        self._sums["weight bytes"] += trace.weight_bytes["spent"]
        self._sums["KV bytes"] += tokens * trace.kv_bytes
