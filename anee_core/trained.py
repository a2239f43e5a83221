"""What parts of a policy that have trained weights share: how they get them, for the model they are bound to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from anee_core.errors import PolicyError
from anee_core.interfaces import Setting


class Weights(Protocol):
    """Weights of one model's layers."""

    @property
    def size(self) -> tuple[int, int]:
        """Number of layers and width of the model that they are for."""


W = TypeVar("W", bound=Weights)


def weights_for(part: Any, load: Callable[[str], W], setting: Setting, command: str, held: W | None = None) -> W:
    """Return the weights in the folder that a part of a policy names, if they are for the model of ``setting``.

    Args:
        part: has a name and the option ``folder``.
        load: reads a folder.
        setting: the model.
        command: makes such weights, for messages.
        held: weights in memory; they need no folder.

    Raises:
        PolicyError: there are none, or they are of another shape.
        CheckpointError: they cannot be read.
    """
    if held is None and not part.folder:
        raise PolicyError(
            f"{part.name}: no weights are installed for this model; make some ({command}) and name the folder, as in "
            f"'{part.name}:FOLDER'"
        )
    weights = held if held is not None else load(part.folder)
    layers, width = weights.size
    if (layers, width) != (setting.num_layers, setting.width):
        raise PolicyError(
            f"{part.name}: the weights in {part.folder} are for {layers} layers of width {width}, the model has "
            f"{setting.num_layers} of {setting.width}; make some for this model ({command})"
        )
    return weights
