"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from anee.commands.flags import Flags
from anee_core.errors import InputError
from anee_core.ranges import Count, TorchSeed, Within, check_numbers

Model = Annotated[str, typer.Argument(help="A model source, hub id or local folder.")]
Prompt = Annotated[str, typer.Argument(help="The text to continue.")]
NamedTexts = Annotated[list[str], typer.Option("--text", "-t", help="NAME=FILE to measure on; may be repeated.")]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    policy: str = "dense"
    """A policy string, like 'static:skip=5 14'."""
    budget: float | None = None
    """Share of the dense FLOPs that may be spent."""
    dtype: str | None = None
    """Type of the weights: float32, bfloat16 or float16. Default: as stored."""
    device: str | None = None
    """Where to run, like cuda:0."""
    trust_remote_code: bool = False
    """Let a model's folder run code of its own."""

    def load(self, model: str, **options: Any) -> Any:
        """Return the model under the policy; ``options`` are further ones of `anee.load`."""
        from anee_core.load import load  # heavy: imported where used, so that help and listings are instant

        if self.trust_remote_code:
            options["trust_remote_code"] = True
        return load(model, self.policy, self.budget, dtype=self.dtype, device=self.device, **options)


UnderPolicy = Annotated[Loading, Flags(short={"policy": "-p", "budget": "-b"})]


@dataclass(frozen=True)
class Continuation:
    """How a prompt is continued."""

    max_new_tokens: Count = 50
    """How many tokens to add."""
    sample: bool = False
    """Sample instead of taking the likeliest token."""
    temperature: Annotated[float, Within(1e-20, 1e20, whole=False)] = 1.0
    """Temperature of sampling."""
    seed: TorchSeed | None = None
    """Seed of sampling."""

    def __post_init__(self) -> None:
        check_numbers(self)

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
