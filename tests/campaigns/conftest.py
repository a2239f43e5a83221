"""Campaigns: seeded trials, few by default and thousands under ``--long``, whose figures are written down."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

FIGURES = Path(__file__).parents[2] / "build" / "campaigns"
"""Where a long run leaves one file for each campaign."""


class Campaign:
    """Counted trials of one kind: iterated over, it yields the seeds 0, 1, 2, ...; what `fault` is told is raised last.

    Args:
        request: of the test.
    """

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._file = request.path.name
        self._long: bool = request.config.getoption("--long")
        self._name, self._trials, self._faults = "", 0, []
        self._outcomes: dict[str, int] = {}

    def trials(self, what: str, short: int, long: int, each: int = 1):
        """Yield the seeds of a campaign, and say ``what`` is tried.

        There are ``short`` trials, or ``long`` ones under ``--long``; a seed is good for ``each`` of them.
        """
        self._name = what
        for seed in range((long if self._long else short) // each):
            self._trials += each
            yield seed

    @property
    def long(self) -> bool:
        """Whether this is the long form."""
        return self._long

    def count(self, outcome: str) -> None:
        """Note how a trial ended, where more than one end is right."""
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1

    def fault(self, message: str) -> None:
        """Note a trial that ended as none should; the others go on."""
        self._faults.append(message)

    def close(self, seconds: float) -> None:
        """Write the figures down if this is the long form, and fail if there was a fault."""
        if self._long and self._name:
            FIGURES.mkdir(parents=True, exist_ok=True)
            figures = {
                "what": self._name,
                "file": self._file,
                "trials": self._trials,
                "outcomes": self._outcomes,
                "faults": self._faults,
                "seconds": round(seconds, 1),
            }
            place = FIGURES / f"{self._name.replace(' ', '-').replace(',', '')}.json"
            place.write_text(json.dumps(figures, indent=2) + "\n")
        assert not self._faults, f"{len(self._faults)} of {self._trials} trials: " + "\n".join(self._faults[:10])


@pytest.fixture
def campaign(request):
    """Return a `Campaign` for the test; its faults fail the test at its end."""
    started, campaign = time.monotonic(), Campaign(request)
    yield campaign
    campaign.close(time.monotonic() - started)
