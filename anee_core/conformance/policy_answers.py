"""Checks of what a policy answers, asked without a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anee_core.cache.token_logs import compared
from anee_core.conformance.check import check, expect
from anee_core.conformance.policy_subject import PolicySubject
from anee_core.interfaces.cache_policy import CachePolicy, CacheView
from anee_core.interfaces.controller import DecisionContext
from anee_core.interfaces.profiler import Observation


@check("answers", look="Controller.decide, CachePolicy.retain and remember")
def answers(subject: PolicySubject) -> None:
    """Actions are uint8 [N, B, T] of PROCESS, SKIP and EXIT; what is kept is bool [B, T, S]."""
    adaptive = subject.adaptive("llama")
    policy, layers = adaptive.policy, adaptive.engine.costs.num_layers
    generator = torch.Generator().manual_seed(0)
    ids = subject.subject("llama").tokens(3, 7)
    positions = torch.arange(7).expand(3, -1)
    for layer_idx in (0, layers - 1):
        for tokens in (7, 1):
            signals = policy.profiler.observe(
                _observation(layer_idx, layers, positions[:, :tokens], generator), policy.controller.signals
            )
            context = DecisionContext(
                layer_idx, layers, positions[:, :tokens], ids[:, :tokens], "decode", adaptive.engine.budget.limit
            )
            if policy.controller.compares:
                score = policy.controller.score(signals, context)
                expect(tuple(score.shape) == (3, tokens), f"scores of shape {(3, tokens)}", score.shape, answers.look)
                lower, among = compared(score, score, policy.controller.compares)
                context = replace(context, score=score, lower=lower, compared=among)
            _check_actions(policy.controller.decide(signals, context), layers - layer_idx, tokens)
            embedded = replace(context, input_ids=None)  # embeddings were given in their place
            _check_actions(policy.controller.decide(signals, embedded), layers - layer_idx, tokens)
    for tokens in (4, 1):
        view = _view(policy.cache_policy, tokens, held=9, generator=generator)
        _check_kept(policy.cache_policy, view)
        if policy.cache_policy.alike:
            _check_alike(policy.cache_policy, view)


def _observation(layer_idx: int, layers: int, positions: Tensor, generator: torch.Generator) -> Observation:
    """Return made-up hidden states in front of a layer."""
    batch, tokens = positions.shape
    states = torch.randn(2, batch, tokens, 32, generator=generator)
    feedback = torch.rand(batch, tokens, 3, generator=generator)
    return Observation(states[0], states[1], layer_idx, layers, torch.zeros(batch, tokens), positions, 0.9, feedback)


def _view(policy: CachePolicy, tokens: int, held: int, generator: torch.Generator) -> CacheView:
    """Return three rows of a made-up layer, the last of them padded."""
    real = torch.ones(3, tokens, dtype=torch.bool)
    valid = torch.ones(3, held, dtype=torch.bool)
    valid[2, 0] = False
    attention = torch.randn(3, 4, tokens, held, generator=generator)
    attention[:, :, torch.arange(held) > held - tokens + torch.arange(tokens)[:, None]] = -torch.inf
    view = CacheView(
        layer_idx=1,
        position_ids=torch.arange(held).expand(3, -1),
        valid=valid,
        query_position=torch.arange(held - tokens, held).expand(3, -1),
        ran=real,
        real=real,
        state={},
        states=torch.randn(3, tokens, 32, generator=generator) if "states" in policy.wants else None,
        keys=torch.randn(3, 2, held, 8, generator=generator) if "keys" in policy.wants else None,
        attention=attention if "attention" in policy.wants else None,
    )
    known = policy.remember(view)
    for name, rows in known.items():
        fits = isinstance(rows, Tensor) and tuple(rows.shape[:2]) == (3, tokens)
        expect(fits, f"'{name}' of shape [3, {tokens}, ...] from remember", rows, answers.look)
    return replace(view, state={name: _padded(rows, held) for name, rows in known.items()})


def _padded(rows: Tensor, held: int) -> Tensor:
    return torch.cat((rows.new_zeros(rows.shape[0], held - rows.shape[1], *rows.shape[2:]), rows), dim=1)


def _check_kept(policy: CachePolicy, view: CacheView) -> None:
    tensors = {name: value for name, value in vars(view).items() if isinstance(value, Tensor)} | dict(view.state)
    before = {name: value.clone() for name, value in tensors.items()}
    keep, changed = policy.decide(view)
    for name, value in before.items():
        expect(torch.equal(tensors[name], value), f"'{name}' as it was", "changed by decide", answers.look)
    expect(isinstance(keep, Tensor) and keep.dtype == torch.bool, "a bool tensor of what to keep", keep, answers.look)
    wanted = (*view.query_position.shape, view.valid.shape[1])
    fits = keep.dim() == 3 and all(size in (1, full) for size, full in zip(keep.shape, wanted, strict=True))
    expect(fits, f"what to keep of shape {list(wanted)}", list(keep.shape), answers.look)
    expect(
        set(changed) <= set(view.state),
        f"to change only what it remembers ({set(view.state)})",
        set(changed),
        answers.look,
    )
    expect(
        not changed or policy.rewrites,
        "rewrites = True for a policy that changes what it remembers",
        False,
        answers.look,
    )


def _check_alike(policy: CachePolicy, view: CacheView) -> None:
    """Hold a policy that says so to keeping the same tokens in all layers, whatever they are."""
    alike = "alike = False for a policy that"
    expect(not policy.wants and not view.state, f"{alike} looks at tokens or remembers them", True, answers.look)
    first, other = (policy.retain(replace(view, layer_idx=i, ran=view.ran & ran)) for i, ran in ((0, True), (2, False)))
    expect(torch.equal(first, other), f"{alike} keeps other tokens in other layers", True, answers.look)


def _check_actions(actions: Any, left: int, tokens: int) -> None:
    expect(isinstance(actions, Tensor) and actions.dtype == torch.uint8, "uint8 actions", actions, answers.look)
    fits = actions.dim() == 3 and 1 <= actions.shape[0] <= left and tuple(actions.shape[1:]) == (3, tokens)
    expect(fits, f"actions [1 to {left}, 3, {tokens}]", list(actions.shape), answers.look)
    expect(actions.max() <= 2, "actions 0, 1 or 2", int(actions.max()), answers.look)
