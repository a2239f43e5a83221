"""The one rule for rows that are longer than a model's context, whatever the way in."""

from __future__ import annotations

import logging

from anee_core.adapter.layout import Parts
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.errors import InputError

logger = logging.getLogger(__name__)


class Context:
    """How far a model's positions reach.

    Behind the end of a table of positions, and where rotary frequencies change with the length, the model cannot place
    a token as it placed those before: it is refused. Otherwise the context is what the model was trained for: longer
    rows run, and that is said once.
    """

    def __init__(self, adapter: ModelAdapter, parts: Parts) -> None:
        self._end = adapter.position_limit(parts)
        self._trained_for = adapter.max_positions(parts.config)

    def concerns(self, length: int) -> bool:
        """Return whether there is something to be said of rows of ``length`` tokens."""
        return any(limit is not None and length > limit for limit in (self._end, self._trained_for))

    def check(self, length: int) -> None:
        """Look at rows whose last token has the position ``length - 1``.

        Raises:
            InputError: the model has no such position.
        """
        self.refuse_beyond(length)
        if self._trained_for is not None and length > self._trained_for:
            logger.warning(
                "a row has gone beyond the context of %d tokens that the model was trained for: it goes on, and may "
                "get worse; a token policy like 'window' bounds what is kept, and no position",
                self._trained_for,
            )
            self._trained_for = None  # said once

    def refuse_beyond(self, length: int) -> None:
        """Raise `InputError` if the model has no position ``length - 1``."""
        if self._end is not None and length > self._end:
            raise InputError(
                f"position {length - 1} lies beyond the model's context of {self._end} tokens: shorten the prompt or "
                "lower max_new_tokens"
            )
