"""What a benchmark of speed measures."""

from __future__ import annotations

from dataclasses import dataclass

from anee_core.errors import InputError


@dataclass(frozen=True)
class BenchOptions:
    """What a benchmark of speed measures."""

    model: str = "smollm2"
    """A model source, hub id, folder or one of `SIZES`, which get random weights."""
    dtype: str = "bfloat16"
    """Type of the weights: float32, bfloat16 or float16."""
    batch: int = 1
    """Sequences at once."""
    context: int = 128
    """Tokens of each prompt."""
    tokens: int = 24
    """New tokens whose times are taken."""
    repeats: int = 5
    """How often each contender is run; they take turns."""
    skipped: tuple[float, ...] = (0.25, 0.5, 0.58)
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
        if min(self.batch, self.context, self.repeats) < 1 or self.tokens < 2:
            raise InputError("batch, context and repeats are at least 1, tokens at least 2")
        if any(not 0 < share < 1 for share in self.skipped):
            raise InputError(f"shares of layers to skip lie in (0, 1); got {self.skipped}")
        if not self.on_cpu and (self.peers or self.weights):
            raise InputError(f"other engines and int8 or int4 weights are for the CPU; leave them out on {self.device}")


def policy_and_budget(text: str) -> tuple[str, float | None]:
    """Read POLICY or POLICY@BUDGET.

    Raises:
        InputError: what stands after the @ is no number.
    """
    name, _, budget = text.partition("@")
    try:
        return name, float(budget) if budget else None
    except ValueError as error:
        raise InputError(f"'{text}' names no budget: write a number after the @, as in rl@0.7") from error


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep measures."""

    budgets: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    """Budgets of every policy; in a policy string with ``{budget}`` each takes that place."""
    length: int = 512
    """Tokens per block of text."""
    blocks: int = 4
    """Blocks of each text."""
    tokens: int = 16
    """Tokens to decode for each measurement of time."""
    repeats: int = 3
    """How often each time is measured, alternating with the dense model; the median counts. 0: no times."""
    dtype: str | None = None
    """Type of the weights: float32, bfloat16 or float16. Default: as stored."""
    device: str | None = None
    """Where they run. Default: on the CPU."""

    def __post_init__(self) -> None:
        if not self.budgets or not all(0 < budget <= 1 for budget in self.budgets):
            raise InputError(f"budgets lie in (0, 1]; got {', '.join(map(str, self.budgets)) or 'none'}")
        if min(self.blocks, self.tokens) < 1 or self.length < 2 or self.repeats < 0:
            raise InputError("blocks and tokens are at least 1, length at least 2, repeats at least 0")
