"""A block that is run in as few pieces as the policy allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from anee_core.accounting.trace import Trace
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.engine.block import Block
from anee_core.engine.engine import Engine, Output
from anee_core.errors import InputError


@dataclass(frozen=True)
class Wanted:
    """How a block is to be run, and what is wanted of it."""

    dense: int
    """How many of the first tokens run every layer, whatever the policy."""
    piece: int
    """Tokens of a piece under a policy that drops tokens."""
    last: int
    """How many last real positions of each row to return logits of; 0 for all positions."""
    states: bool
    """Whether to keep the input of every layer and the final states."""


@dataclass(frozen=True)
class Result:
    """What a block became."""

    logits: Tensor
    """[B, N, V] logits of the positions that were wanted."""
    states: tuple[Tensor, ...] | None
    """Input of every layer and the final states, each [B, T, D]; None if they were not wanted."""


def run_in_pieces(engine: Engine, block: Block, cache: AdaptiveCache, trace: Trace, wanted: Wanted) -> Result:
    """Run a block and record it in the trace."""
    outputs: list[Output] = []
    known: list[Tensor] = []
    pieces = list(_pieces(engine, block, cache, wanted))
    for piece, dense in pieces:
        output = engine.run(piece, cache, trace, dense, wanted.states)
        if outputs and output.hidden_states.requires_grad:
            output.hidden_states.register_hook(_refuse_gradient)  # type: ignore[no-untyped-call]
        outputs.append(output)
        if engine.policy.feeds_back:
            last = engine.logits(_last(output.hidden_states, 1, piece.real), trace)
            engine.feed_back(piece, cache, output, last[:, -1])
            known.append(last)
    states = _joined(outputs) if wanted.states else None
    tokens = block.position_ids.shape[1]
    if known and (len(pieces) == tokens or (wanted.last == 1 and len(pieces) == 1)):
        logits = torch.cat(known, dim=1)
        return Result(_last(logits, wanted.last, block.real), states)
    final = [output.hidden_states for output in outputs]
    hidden_states = final[0] if len(final) == 1 else torch.cat(final, dim=1)
    return Result(engine.logits(_last(hidden_states, wanted.last, block.real), trace), states)


def _pieces(engine: Engine, block: Block, cache: AdaptiveCache, wanted: Wanted) -> Iterator[tuple[Block, bool]]:
    """Yield the pieces of a block, and whether each runs every layer."""
    for part, dense in zip(block.cut(wanted.dense), (True, False), strict=True):
        if part is not None:
            length = _length(engine, cache, wanted.piece, dense) or part.position_ids.shape[1]
            yield from ((piece, dense) for piece in part.split(length))


def _length(engine: Engine, cache: AdaptiveCache, piece: int, dense: bool) -> int | None:
    """Return how many tokens to run at once; None for all."""
    policy = engine.policy
    if policy.feeds_back and not dense:
        return 1
    if policy.cache_policy.keeps_all or engine.differentiates:
        return None
    # What a policy rewrites can be restored at the end of a block only.
    return 1 if cache.keeps_dropped and policy.cache_policy.rewrites else piece


def _refuse_gradient(gradient: Tensor) -> None:
    """Raise `InputError`: what pieces wrote into the cache before has let go of its gradient."""
    raise InputError(
        "no gradient can be had from a sequence that was read in pieces: a policy that looks at the model's output for "
        "earlier tokens, as 'heuristic' does, reads it token by token; train under another one"
    )


def _last(states: Tensor, count: int, real: Tensor | None) -> Tensor:
    """Return each row's last ``count`` real positions of [B, T, D], 0 for all; padding first where a row has fewer."""
    if count == 0 or real is None or states.shape[1] == 1:
        return states[:, -count:]
    columns = torch.argsort(real.int(), dim=1, stable=True)[:, -count:]
    return states.gather(1, columns[:, :, None].expand(-1, -1, states.shape[-1]))


def _joined(outputs: list[Output]) -> tuple[Tensor, ...]:
    """Return the input of every layer and the final states, each [B, T, D], of pieces of one block."""
    stacks = [(*output.inputs, output.hidden_states) for output in outputs]
    return tuple(torch.cat(parts, dim=1) for parts in zip(*stacks, strict=True))
