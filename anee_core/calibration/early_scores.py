"""What a gate expects of a sequence of which it has seen little: the scores of first tokens, which are other ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anee_core.controllers.gate import GateController, GateWeights
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.policy.policy import Policy

_TOKENS = 36
"""How many tokens of a sequence, behind those that run every layer, are its first ones."""


def expecting_early_scores(gate: GateWeights, model: AdaptiveModel, policy: Policy, blocks: Tensor) -> GateWeights:
    """Return a gate whose normal distribution is that of the scores of first tokens.

    It counts for a few tokens beside those that were seen, and so hardly at all once many were. Taken from whole
    sequences, it made short ones overspend.

    Args:
        gate: what the policy runs.
        model: its model; it stays as it is.
        policy: a gate with its shortcuts.
        blocks: token ids [N, T] of text.
    """
    controller = policy.controller
    assert isinstance(controller, GateController)
    probe, first = AdaptiveModel(model.model, model.adapter), controller.first
    beginnings = blocks[:, : first + _TOKENS].to(model.device)
    means, spreads = [], []
    for budget in gate.budgets[1:-1].tolist():
        cache = probe.set_policy(policy, budget).new_cache()
        with torch.no_grad():
            probe(beginnings, past_key_values=cache, logits_to_keep=1)
        assert cache.scores is not None
        scores = cache.scores.entries(cache.seen)[:, first : cache.seen].flatten(0, 1).cpu()  # [N, L]
        means.append(scores.mean(0))
        spreads.append(scores.std(0))
    if not means:
        return gate
    mean, spread = torch.stack(means).mean(0), torch.stack(spreads).mean(0)
    # Protected layers give no scores, and one block of equal tokens has no spread.
    known = mean.isfinite() & (spread > 0)
    return replace(gate, mean=mean.where(known, gate.mean), spread=spread.where(known, gate.spread))
