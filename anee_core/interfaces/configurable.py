"""What the parts of a policy share: options that a policy string sets, and weights that were trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, Protocol, TypeVar

from anee_core.checkpoint import CheckpointFormat
from anee_core.errors import PolicyError
from anee_core.interfaces.setting import Setting


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


class Configurable:
    """A dataclass whose fields are the options that a policy string can set."""

    positional: ClassVar[str | None] = None
    """The option whose name may be left out where it stands first."""
    checkpoint: ClassVar[CheckpointFormat | None] = None
    """For what is trained: what the folder named by its option ``folder`` holds. If the option is empty, `anee.load`
    takes the folder that an installed plugin has for the model."""

    @property
    def holds_weights(self) -> bool:
        """Whether it was made with trained weights in memory, so that it needs no folder."""
        return False

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Return the options a policy string may set."""
        return tuple(f.name for f in fields(cls) if f.init and not f.name.startswith("_"))  # type: ignore[arg-type]

    def options(self) -> dict[str, Any]:
        """Return the options and their values."""
        return {name: getattr(self, name) for name in self.option_names()}
