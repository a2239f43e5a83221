"""What a policy may know of the tokens before a block: kept in the cache, for policies that ask."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.cache.token_logs import FeedbackLog, ScoreLog
from anee_core.engine.block import Block
from anee_core.engine.bound import Bound


@dataclass(frozen=True)
class Past:
    """What is known of earlier tokens."""

    seen: int = 0
    """Number of earlier tokens."""
    feedback: Tensor | None = None
    """[B, 1, 3] `Observation.feedback` of the token to come; None for a policy that does not feed back."""
    scores: ScoreLog | None = None
    """Scores of earlier tokens; None for a controller that does not compare."""


def past_of(bound: Bound, block: Block, cache: AdaptiveCache, dense: bool) -> Past:
    """Return what the policy may know before a block; nothing if it is not asked because all layers run (``dense``)."""
    feeds_back = bound.policy.feeds_back and not dense
    feedback = feedback_log(bound, block, cache, cache.seen).entry(cache.seen) if feeds_back else None
    return Past(cache.seen, feedback, _scores(bound, block, cache, dense))


def feedback_log(bound: Bound, block: Block, cache: AdaptiveCache, start: int) -> FeedbackLog:
    """Return the cache's log of what policies feed back; a new one begins after ``start`` tokens."""
    if cache.feedback is None:
        batch, device = block.position_ids.shape[0], block.position_ids.device
        cache.feedback = FeedbackLog(batch, device, start, bound.budget.limit or 1.0)
    return cache.feedback


def _scores(bound: Bound, block: Block, cache: AdaptiveCache, dense: bool) -> ScoreLog | None:
    """Return where scores are kept; None if the controller compares no tokens, or is not asked."""
    if not bound.policy.controller.compares:
        return None
    batch, tokens = block.position_ids.shape
    if cache.scores is None:
        cache.scores = ScoreLog(batch, bound.num_layers, block.position_ids.device, cache.seen)
    if dense:
        cache.scores.skip(cache.seen, tokens)
        return None
    return cache.scores
