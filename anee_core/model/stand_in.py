"""`StandIn`: what lets a module that holds a transformers model pass for that model."""

from __future__ import annotations

from typing import Any

from torch import nn


class StandIn(nn.Module):
    """A module that is of the class of the model it holds, and has its attributes and its weights.

    transformers' ``Trainer`` saves, and a pipeline takes, what is an instance of the classes they know.
    """

    model: nn.Module
    """The model that this stands in for."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the model held: `isinstance` counts it besides this one's own, as for any proxy."""
        held = self.__dict__.get("_modules", {}).get("model")
        return type(self) if held is None else held.__class__

    def __reduce__(self) -> Any:
        """Return what a copy is made of: pickle would go by `__class__`."""
        return object.__new__, (type(self),), self.__dict__

    def __getattr__(self, name: str) -> Any:
        """Look up what this class lacks in the model held."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "parts") or name.startswith("__"):
                raise
            return getattr(self.model, name)

    def __dir__(self) -> list[str]:
        """Return the names of this class's attributes and of the model's."""
        return sorted({*object.__dir__(self), *dir(type(self)), *dir(self.model)})

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weights of the model held, under the names that it has for them.

        Inside another module, such as PEFT's, they go by the path that leads to them, like any module's.
        """
        inside = args or kwargs.get("destination") is not None
        return super().state_dict(*args, **kwargs) if inside else self.model.state_dict(**kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights into the model held, by the names that it has for them."""
        return self.model.load_state_dict(*args, **kwargs)
