"""What a benchmark of speed measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from anee_core.errors import InputError
from anee_core.ranges import Count, CountOrNone, Length, PartialShare, Size, SomeShare, Within, check_numbers


@dataclass(frozen=True)
class BenchOptions:
    """What a benchmark of speed measures."""

    model: str = "smollm2"
    """A model source, hub id, folder or one of `SIZES`, which get random weights."""
    dtype: str = "bfloat16"
    """Type of the weights: float32, bfloat16 or float16."""
    batch: Size = 1
    """Sequences at once."""
    context: Annotated[int, Within(1, 2**20)] = 128
    """Tokens of each prompt."""
    tokens: Length = 24
    """New tokens whose times are taken."""
    repeats: Count = 5
    """How often each contender is run; they take turns."""
    skipped: tuple[PartialShare, ...] = (0.25, 0.5, 0.58)
    """Shares of the layers to skip, at random for each token."""
    policies: tuple[str, ...] = ()
    """Further policy strings, each with a budget after an ``@`` if it takes one, as in ``rl@0.7``."""
    compiled: bool = False
    """Whether transformers compiled with a static cache takes part, which takes minutes to compile."""
    peers: bool = False
    """Whether other engines take part, where they are installed and the batch is 1."""
    weights: tuple[str, ...] = ()
    """Quantisations of the layers' weights that take part too, dense and with the last share skipped."""
    device: str = "cpu"
    """Where it runs; other engines and quantised weights take part on the CPU alone."""

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on the CPU."""
        return self.device == "cpu"

    def __post_init__(self) -> None:
        check_numbers(self)
        if not self.on_cpu and (self.peers or self.weights):
            raise InputError(f"other engines and int8 or int4 weights are for the CPU; leave them out on {self.device}")


def policy_and_budget(text: str) -> tuple[str, float | None]:
    """Read POLICY or POLICY@BUDGET; a repository on the hub may have a revision of its own, OWNER/NAME@REVISION.

    Raises:
        InputError: what stands after the @ is no number.
    """
    from anee_core.policy.hub import is_address  # which takes torch: a command's help reads this file

    name, at, budget = text.rpartition("@")
    try:
        return (name, float(budget)) if at else (text, None)
    except ValueError as error:
        if is_address(text):
            return text, None
        raise InputError(f"'{text}' names no budget: write a number after the @, as in rl@0.7") from error


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep measures."""

    budgets: tuple[SomeShare, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    """Budgets of every policy; in a policy string with ``{budget}`` each takes that place."""
    length: Length = 512
    """Tokens per block of text."""
    blocks: Size = 4
    """Blocks of each text."""
    tokens: Annotated[int, Within(1, 2**20)] = 16
    """Tokens to decode for each measurement of time."""
    repeats: CountOrNone = 3
    """How often each time is measured, alternating with the dense model; the median counts. 0: no times."""
    dtype: str | None = None
    """Type of the weights: float32, bfloat16 or float16. Default: as stored."""
    device: str | None = None
    """Where they run. Default: on the CPU."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if not self.budgets:
            raise InputError("budgets are numbers in (0, 1]; got none")
