"""Training adaptively sparse attention: soft survival in place of dropping, sharpened step by step.

The method is that of Anagnostidis et al., 2023 (arXiv:2305.15805). Here it works for every registered family, starts
from the unchanged model, and is validated as it will be deployed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from anee_core.adapter.layout import Parts
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.cache_policies.asa import AsaWeights
from anee_core.engine.whole_sequences import WholeSequences
from anee_core.errors import InputError
from anee_core.evaluation.divergence import divergence
from anee_core.training.objective import Objective
from anee_core.training.schedules import Schedule
from anee_core.training.sparse_sigmoid import log_survival


class Interactions(nn.Module):
    """The trained part: projections [L, r, D] for queries and keys, and a bias per layer.

    Interaction logits start next to ``beta``. From 1/(alpha - 1) on the sparse sigmoid is 1: nothing is dropped, and
    the model is the one that it was.
    """

    def __init__(self, layers: int, rank: int, width: int, beta: float, spread: float = 1e-3) -> None:
        super().__init__()
        # Normed inputs have entries of about one, so logits have a standard deviation of about `spread`.
        self.query = nn.Parameter(torch.randn(layers, rank, width) / width**0.5)
        self.key = nn.Parameter(torch.randn(layers, rank, width) * spread / width**0.5)
        self.beta = nn.Parameter(torch.full((layers,), beta))

    def start_from(self, weights: AsaWeights) -> None:
        """Start from weights that were trained before.

        Raises:
            InputError: they are of another shape.
        """
        for name, parameter in self.named_parameters():
            known = getattr(weights, name)
            if known.shape != parameter.shape:
                raise InputError(
                    f"the weights to start from have a {name} of shape {list(known.shape)}, this training "
                    f"{list(parameter.shape)}; choose their rank, and the model that they are of"
                )
            parameter.data.copy_(known)

    def forward(self, layer_idx: int, attention_input: Tensor) -> Tensor:
        """Return interaction logits [B, T, T] of normed attention inputs [B, T, D]."""
        queries = attention_input @ self.query[layer_idx].T.to(attention_input.dtype)
        keys = attention_input @ self.key[layer_idx].T.to(attention_input.dtype)
        return (queries @ keys.transpose(1, 2)).float() * self.query.shape[1] ** -0.5 + self.beta[layer_idx]


class SparseAttention(Objective):
    """Loss of a model whose tokens fade from its layers' attention, and what that saves.

    It takes many parameters because it is put together of parts that are made elsewhere.

    Args:
        adapter: knows the model's family.
        parts: the model's modules.
        interactions: the trained part.
        alpha: sharpness of the sparse sigmoid, by step.
        gamma: weight of the mean survival over all pairs of a token and an earlier one.
        target: share of those pairs to drop; gamma then changes by the step until it is met. None for a fixed gamma.
        distil: whether to learn from the dense model's next-token distributions instead of the text. If the whole model
            is trained, it learns from the text as a dense one too, and its sparse self from that: one model for both.
        held_out: blocks [N, T] to validate on, as deployed.
        unchanged: makes a context in which the model is the one that it was, if low-rank updates change it.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        parts: Parts,
        interactions: Interactions,
        alpha: Schedule,
        gamma: float,
        target: float | None = None,
        distil: bool = False,
        held_out: Tensor | None = None,
        unchanged: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.model = parts.model
        self._unchanged = unchanged
        self._trains_all = all(parameter.requires_grad for parameter in parts.model.parameters())
        self.interactions = interactions
        self.adapter, self.parts = adapter, parts
        self.alpha_schedule, self.alpha = alpha, 1.0
        self.target, self.distil, self.held_out = target, distil, held_out
        self.gamma: Tensor
        self.register_buffer("gamma", torch.tensor(float(gamma)))

    def train(self, mode: bool = True) -> SparseAttention:
        """Switch to training; a model that is not trained itself stays without dropout."""
        super().train(mode)
        if not self._trains_all:
            self.model.eval()
        return self

    def begin(self, step: int) -> None:
        """Set the sharpness of the sparse sigmoid."""
        self.alpha = self.alpha_schedule(step)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of token ids [B, T]."""
        logits, survivals = self.run(input_ids, self.alpha)
        held = torch.stack([mean_survival(survival) for survival in survivals]).mean()
        figures = {"sparsity": 1 - held.detach(), "alpha": torch.tensor(self.alpha), "gamma": self.gamma.clone()}
        loss = self.gamma * held
        if self.distil:
            with torch.set_grad_enabled(self._trains_all), self._unchanged():
                wanted, _ = self.run(input_ids, None)
            if self._trains_all:
                dense = next_token_loss(wanted, input_ids)
                loss, figures = loss + dense, {"dense": dense.detach(), **figures}
            quality = divergence(wanted.detach(), logits)
        else:
            quality = next_token_loss(logits, input_ids)
        return loss + quality, {"quality": quality.detach(), **figures}

    def run(self, input_ids: Tensor, alpha: float | None) -> tuple[Tensor, list[Tensor]]:
        """Return logits [B, T, V] and, for each layer, the logarithm of survival [B, T, T].

        An infinite ``alpha`` is what is deployed, None is dense.
        """
        sequences = WholeSequences(self.adapter, self.parts, input_ids)
        hidden_states = sequences.embedded
        survivals = []
        for layer_idx in range(len(self.parts.layers)):
            survival = None
            if alpha is not None:
                attention_input = self.adapter.attention_input(self.parts, layer_idx, hidden_states)
                survival = log_survival(self.interactions(layer_idx, attention_input), alpha)
                survivals.append(survival)
            hidden_states = sequences.layer(layer_idx, hidden_states, survival)
        return sequences.logits(hidden_states), survivals

    def weights(self, backbone: str | None = None, **facts: Any) -> AsaWeights:
        """Return the trained part as it is deployed."""
        parts = self.interactions
        return AsaWeights(parts.query.detach(), parts.key.detach(), parts.beta.detach(), backbone, facts)

    def validate(self) -> dict[str, float]:
        """Return the held-out blocks' perplexity and share of context dropped, and the dense model's perplexity.

        Tokens are dropped by the step function that is deployed.
        """
        if self.held_out is None:
            return {}
        loss = dense = dropped = 0.0
        for block in torch.split(self.held_out, 1):
            logits, survivals = self.run(block, math.inf)
            loss += float(next_token_loss(logits, block)) / len(self.held_out)
            dropped += (1 - float(torch.stack([mean_survival(s) for s in survivals]).mean())) / len(self.held_out)
            with self._unchanged():
                dense += float(next_token_loss(self.run(block, None)[0], block)) / len(self.held_out)
        return {"loss": loss, "perplexity": math.exp(loss), "dense": math.exp(dense), "dropped": dropped}

    def after(self, figures: dict[str, float]) -> None:
        """Move gamma towards what drops the target's share."""
        if self.target is not None:
            self.gamma.mul_(math.exp(0.5 * max(-0.2, min(0.2, self.target - figures["sparsity"]))))


def next_token_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits [B, T, V] for the next of token ids [B, T], in nats."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())


def mean_survival(survival: Tensor) -> Tensor:
    """Return the mean of exp(``survival``) [B, T, T] over pairs of a token and an earlier one, a scalar.

    The last query predicts nothing that is scored, and is left out.
    """
    queries = survival.shape[-2]
    pairs = torch.ones(queries, queries, dtype=torch.bool, device=survival.device).tril(-1)
    pairs[-1] = False
    return (survival.exp() * pairs).sum() / (survival.shape[0] * max(int(pairs.sum()), 1))
