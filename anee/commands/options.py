"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from anee.commands.flags import Flags
from anee_core.errors import InputError

Model = Annotated[str, typer.Argument(help="A model source, hub id or local folder.")]
Prompt = Annotated[str, typer.Argument(help="The text to continue.")]
NamedTexts = Annotated[list[str], typer.Option("--text", "-t", help="NAME=FILE to measure on; may be repeated.")]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    Args:
        policy: a policy string, like 'static:skip=5 14'.
        budget: share of the dense FLOPs that may be spent.
        dtype: type of the weights: float32, bfloat16 or float16. Default: as stored.
        device: where to run, like cuda:0.
    """

    policy: str = "dense"
    budget: float | None = None
    dtype: str | None = None
    device: str | None = None

    def load(self, model: str, **options: Any) -> Any:
        """Return the model under the policy; ``options`` are further ones of `anee.load`."""
        from anee_core.load import load  # heavy: imported where used, so that help and listings are instant

        return load(model, self.policy, self.budget, dtype=self.dtype, device=self.device, **options)


UnderPolicy = Annotated[Loading, Flags(short={"policy": "-p", "budget": "-b"})]


@dataclass(frozen=True)
class Continuation:
    """How a prompt is continued.

    Args:
        max_new_tokens: how many tokens to add.
        sample: sample instead of taking the likeliest token.
        temperature: temperature of sampling.
        seed: seed of sampling.
    """

    max_new_tokens: int = 50
    sample: bool = False
    temperature: float = 1.0
    seed: int | None = None

    def of(self, model: Any, prompt: str, **options: Any) -> Any:
        """Return what a model makes of a prompt; ``options`` are further ones of its ``generate``."""
        return model.generate(
            prompt,
            max_new_tokens=self.max_new_tokens,
            do_sample=self.sample,
            temperature=self.temperature,
            seed=self.seed,
            **options,
        )


def named_files(items: list[str]) -> dict[str, Path]:
    """Read NAME=FILE.

    Raises:
        InputError: there is no name.
    """
    wrong = [item for item in items if "=" not in item]
    if wrong:
        raise InputError(f"a text is NAME=FILE; got '{wrong[0]}'")
    return {name: Path(path) for name, path in (item.split("=", 1) for item in items)}
