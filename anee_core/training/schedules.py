"""Values that change with the training step: learning rates, and the alpha of a sparse sigmoid."""

from __future__ import annotations

import math
from collections.abc import Callable

from anee_core.errors import InputError

Schedule = Callable[[int], float]
"""Maps a step, counted from 0, to a value."""


def parse_schedule(text: str) -> Schedule:
    """Read a schedule from a string; after its last step a schedule keeps its last value.

    ``constant_v``; ``linear_s_e_n`` and ``cosine_s_e_n``: from s to e in n steps; ``linearcosine_s_m_n_e_n2``: linearly
    from s to m in n steps, then on a half cosine to e in n2 more.

    Raises:
        InputError: no such schedule, or not that many numbers.
    """
    name, *numbers = text.split("_")
    counts = {"constant": 1, "linear": 3, "cosine": 3, "linearcosine": 5}
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if len(values) != counts.get(name) or any(n < 0 for n in values[2::2]):
        raise InputError(
            f"'{text}' is no schedule; there are constant_v, linear_s_e_n, cosine_s_e_n and linearcosine_s_m_n_e_n2, "
            "as in 'cosine_1_8_25000'"
        )
    if name == "constant":
        return lambda step: values[0]
    if name == "linear":
        return lambda step: linear(values[0], values[1], step, values[2])
    if name == "cosine":
        return lambda step: cosine(values[0], values[1], step, values[2])
    start, middle, first, end, second = values
    return lambda step: (
        linear(start, middle, step, first) if step < first else cosine(middle, end, step - first, second)
    )


def linear(start: float, end: float, step: float, steps: float) -> float:
    """Return the value at ``step`` of a straight line from ``start`` to ``end`` in ``steps`` steps."""
    return end if step >= steps else start + (end - start) * step / steps


def cosine(start: float, end: float, step: float, steps: float) -> float:
    """Return the value at ``step`` of a half cosine from ``start`` to ``end`` in ``steps`` steps."""
    return end if step >= steps else end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def trapezoid(steps: int, warmup: int, decay: int) -> Schedule:
    """Return a factor that rises to 1 in ``warmup`` steps, stays, and falls to 0 over the last ``decay`` of ``steps``.

    The first step is not at 0. With the plateau, a run can be made longer after the fact (Hu et al., 2024,
    arXiv:2404.06395).
    """

    def factor(step: int) -> float:
        rising = (step + 1) / warmup if warmup else 1.0
        falling = (steps - step) / decay if decay else 1.0
        return max(0.0, min(1.0, rising, falling))

    return factor
