"""What the parts of a policy share: options that a policy string sets, and weights that were trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from typing_extensions import Self

from anee_core.checkpoint import CheckpointFormat
from anee_core.errors import PolicyError
from anee_core.interfaces.setting import Setting
from anee_core.ranges import check_numbers


class Configurable:
    """A dataclass whose fields are the options that a policy string can set, but for those with an underscore.

    A number whose type says its range (`anee_core.ranges`) is checked when the part is made; lists become tuples.
    """

    name: ClassVar[str]
    """Name that a policy string uses."""
    positional: ClassVar[str | None] = None
    """The option whose name may be left out where it stands first."""
    checkpoint: ClassVar[CheckpointFormat | None] = None
    """What the folder named by its option ``folder`` holds, for a part that is trained; None for others. If the option
    is empty, `anee.load` takes the folder that an installed plugin has for the model.
    """

    def __post_init__(self) -> None:
        for name, value in self.options().items():
            if isinstance(value, list):  # a policy string gives tuples, and a saved policy is one
                object.__setattr__(self, name, tuple(value))
        check_numbers(self, PolicyError, f"{self.name}: ")

    @property
    def holds_weights(self) -> bool:
        """Whether it was made with trained weights in memory, so that it needs no folder."""
        return False

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Return the options a policy string may set."""
        return tuple(f.name for f in fields(cls) if not f.name.startswith("_"))  # type: ignore[arg-type]

    def options(self) -> dict[str, Any]:
        """Return the options and their values."""
        return {name: getattr(self, name) for name in self.option_names()}


class TrainedWeights:
    """Base of a frozen dataclass of tensors that were fitted or trained, and of facts about that.

    Its fields are the tensors and the facts that ``format`` names.
    """

    format: ClassVar[CheckpointFormat]
    """Format of the folder that holds them."""

    @property
    def size(self) -> tuple[int, int]:
        """Number of layers and width of the model that the weights are for."""
        name, shape = next((n, s) for n, s in self.format.shapes.items() if {"layers", "width"} <= set(s))
        sizes: tuple[int, ...] = getattr(self, name).shape
        return sizes[shape.index("layers")], sizes[shape.index("width")]

    @property
    def tensors(self) -> dict[str, Any]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in self.format.shapes}

    def check(self, folder: str | Path) -> None:
        """Raise `CheckpointError` if what was read from a folder makes no sense."""

    def save(self, folder: str | Path) -> None:
        """Write a JSON header and safetensors into a folder.

        Raises:
            OutputError: the folder cannot be written.
        """
        facts = {name: getattr(self, name) for name in self.format.facts}
        header = {name: dict(fact) if isinstance(fact, Mapping) else fact for name, fact in facts.items()}
        self.format.write(folder, header, self.tensors)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            CheckpointError: see `CheckpointFormat.read`.
        """
        header, tensors = cls.format.read(folder)
        weights = cls(**header, **tensors)
        weights.check(folder)
        return weights


W = TypeVar("W", bound=TrainedWeights)


class Trained(Configurable, Generic[W]):
    """A part of a policy whose weights were trained for one model: a dataclass with ``folder`` and ``_weights``."""

    positional: ClassVar[str | None] = "folder"
    weights_class: ClassVar[type[TrainedWeights]]
    """Class of the weights."""
    command: ClassVar[str]
    """Command that makes such weights, for messages."""

    folder: str
    """Folder that holds the weights; empty if none is named."""
    _weights: W | None
    """Weights in memory; None if they are to be read from the folder."""

    @property
    def holds_weights(self) -> bool:
        """Whether its weights belong to no folder."""
        return self._weights is not None and not self.folder

    @classmethod
    def of(cls, weights: W, **options: Any) -> Self:
        """Return a part with weights in memory, not yet bound."""
        made: Any = cls  # a dataclass, which this class is not
        found: Self = made(_weights=weights, **options)
        return found

    @property
    def weights(self) -> W:
        """The weights, once bound."""
        if self._weights is None:
            raise PolicyError(f"{self.name}: it is not bound to a model")
        return self._weights

    def weights_for(self, setting: Setting) -> W:
        """Return the weights, read from the folder if they are not in memory, if they are for the model of ``setting``.

        Raises:
            PolicyError: there are none, or they are of another shape.
            CheckpointError: they cannot be read.
        """
        if self._weights is None and not self.folder:
            raise PolicyError(
                f"{self.name}: no weights are installed for this model; make some ({self.command}) and name the "
                f"folder, as in '{self.name}:FOLDER'"
            )
        weights: Any = self._weights if self._weights is not None else self.weights_class.load(self.folder)
        layers, width = weights.size
        if (layers, width) != (setting.num_layers, setting.width):
            raise PolicyError(
                f"{self.name}: the weights in {self.folder} are for {layers} layers of width {width}, the model has "
                f"{setting.num_layers} of {setting.width}; make some for this model ({self.command})"
            )
        found: W = weights
        return found
