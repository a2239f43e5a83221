"""The signals of a token in front of a layer, computed on the device of its hidden state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anee_core.errors import PolicyError, suggestion
from anee_core.interfaces.formulas import unit_norm
from anee_core.interfaces.profiler import Observation, Profiler

ENTROPY, MAX_PROBABILITY, SEQUENCE_SPENT = range(3)
"""Columns of `Observation.feedback`."""
STANDARD = "signals"
"""Name of the profiler that controllers get if they name no other."""


@dataclass(frozen=True)
class SignalProfiler(Profiler):
    """The standard signals.

    ============== =====================================================================================
    entropy         entropy of the distribution the token was drawn from, as a share of log(vocabulary)
    max_probability its largest probability
    norm            log(1 + L2 norm) of the hidden state
    delta_norm      log(1 + L2 norm) of what the layer before added to it
    variance        log(1 + variance) of the hidden state over its D entries
    token_budget    what the token may still spend: budget minus its own spending, in dense tokens
    remaining_budget what the sequence may still spend on this token, in dense tokens: unspent budget of
                    the tokens before it is carried over
    depth           layer index over the last layer's index
    unit_state      the hidden state itself, scaled to a root mean square of 1: D columns
    ============== =====================================================================================

    For a first token, which was drawn from no distribution, entropy is 1 and max_probability 0.
    """

    names: ClassVar[tuple[str, ...]] = (
        "entropy",
        "max_probability",
        "norm",
        "delta_norm",
        "variance",
        "token_budget",
        "remaining_budget",
        "depth",
        "unit_state",
    )
    feedback: ClassVar[frozenset[str]] = frozenset({"entropy", "max_probability", "remaining_budget"})

    def observe(self, observation: Observation, names: tuple[str, ...]) -> Tensor:
        """Return the named signals [B, T, F] in fp32."""
        batch, tokens = observation.hidden_states.shape[:2]
        if not names:
            return torch.empty(batch, tokens, 0, device=observation.hidden_states.device)
        parts = [self._signal(observation, name).float() for name in names]
        columns = [part if part.dim() == 3 else part.expand(batch, tokens)[..., None] for part in parts]
        return torch.cat(columns, dim=-1)

    def _signal(self, seen: Observation, name: str) -> Tensor:
        match name:
            case "entropy":
                return self._feedback(seen)[..., ENTROPY]
            case "max_probability":
                return self._feedback(seen)[..., MAX_PROBABILITY]
            case "norm":
                return seen.hidden_states.float().norm(dim=-1).log1p()
            case "delta_norm":
                return (seen.hidden_states.float() - seen.previous.float()).norm(dim=-1).log1p()
            case "variance":
                return seen.hidden_states.float().var(dim=-1, correction=0).log1p()
            case "token_budget":
                return seen.budget - seen.spent
            case "remaining_budget":
                return seen.budget * (seen.seen + 1) - self._feedback(seen)[..., SEQUENCE_SPENT] - seen.spent
            case "depth":
                return torch.full_like(seen.spent, seen.layer_idx / max(seen.num_layers - 1, 1))
            case "unit_state":
                return unit_norm(seen.hidden_states.float())
        raise PolicyError(f"unknown signal '{name}'; {suggestion(name, self.names)}")

    @staticmethod
    def _feedback(seen: Observation) -> Tensor:
        if seen.feedback is None:
            raise PolicyError("this signal needs the model's output for earlier tokens, which was not recorded")
        return seen.feedback


def distribution_signals(logits: Tensor) -> Tensor:
    """Return normalised entropy and largest probability of next-token logits [..., V], as [..., 2] in fp32."""
    log_probabilities = logits.float().log_softmax(dim=-1)
    probabilities = log_probabilities.exp()
    entropy = -(probabilities * log_probabilities).sum(dim=-1)
    vocabulary = torch.tensor(float(logits.shape[-1]), device=logits.device)
    return torch.stack((entropy / vocabulary.log(), probabilities.amax(dim=-1)), dim=-1)
