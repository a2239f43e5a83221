"""What plugins return, checked before it is used: a wrong shape would broadcast and be silently wrong.

Shapes and types cost nothing to check. Values would have to be read back from the device, so that is done where a
prompt is read and not for each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anee_core.errors import PolicyError
from anee_core.interfaces.cache_policy import CachePolicy
from anee_core.interfaces.controller import Action, Controller
from anee_core.interfaces.profiler import Profiler


def check_actions(actions: Any, controller: Controller, shape: tuple[int, int], layers_left: int) -> None:
    """Raise `PolicyError` unless a controller returned actions [N, B, T] for at most the layers that are left."""
    if not isinstance(actions, Tensor) or actions.is_floating_point() or actions.dtype == torch.bool:
        raise PolicyError(f"{_named(controller)} decides by actions, a tensor of uint8; it returned {_told(actions)}")
    if actions.dim() != 3 or actions.shape[1:] != shape or not 1 <= actions.shape[0] <= layers_left:
        raise PolicyError(
            f"{_named(controller)} decides by actions [N, {shape[0]}, {shape[1]}] for 1 to {layers_left} layers; "
            f"it returned {_told(actions)}"
        )
    if shape[1] > 1 and int(actions.max()) > Action.EXIT:
        raise PolicyError(f"{_named(controller)} returned the action {int(actions.max())}; actions are 0, 1 and 2")


def check_signals(signals: Any, profiler: Profiler, controller: Controller, shape: tuple[int, int]) -> None:
    """Raise `PolicyError` unless a profiler returned signals [B, T, F]."""
    wanted = controller.signals
    if not isinstance(signals, Tensor) or signals.dim() != 3 or signals.shape[:2] != shape:
        raise PolicyError(
            f"the profiler {type(profiler).__name__} observes [{shape[0]}, {shape[1]}, F]; it returned {_told(signals)}"
        )
    if signals.shape[2] < len(wanted):
        raise PolicyError(
            f"the profiler {type(profiler).__name__} returned {signals.shape[2]} columns for the signals "
            f"{', '.join(wanted)}, at least one each"
        )


def check_kept(keep: Any, policy: CachePolicy, shape: tuple[int, int, int]) -> None:
    """Raise `PolicyError` unless a token policy returned a bool tensor that broadcasts to [B, T, S]."""
    fits = isinstance(keep, Tensor) and keep.dtype == torch.bool and keep.dim() == 3
    if not fits or any(mine not in (1, wanted) for mine, wanted in zip(keep.shape, shape, strict=True)):
        raise PolicyError(
            f"{_named(policy)} says what to keep by a bool tensor that broadcasts to {list(shape)}; "
            f"it returned {_told(keep)}"
        )


def check_remembered(state: Mapping[str, Any], policy: CachePolicy, shape: tuple[int, int]) -> None:
    """Raise `PolicyError` unless what a token policy wants to have remembered is [B, T, ...] for each name."""
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[:2] != shape:
            raise PolicyError(
                f"{_named(policy)} remembers '{name}' as [{shape[0]}, {shape[1]}, ...]; it returned {_told(value)}"
            )


def _named(part: Controller | CachePolicy) -> str:
    return f"policy '{part.name}'"


def _told(value: Any) -> str:
    """Return in a few words what was returned."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
