"""The command that continues a prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape

from anee.commands.flags import Flags, flat
from anee.commands.options import Continuation, Loading, Model, Prompt


@dataclass(frozen=True)
class GenerateLoading(Loading):
    """How a model is loaded to generate."""

    hard: bool = False
    """Let no token exceed the budget."""
    weights: str | None = None
    """Quantise the layers' weights: int8 or int4."""
    prefill: str = "auto"
    """How the prompt is read: auto, adaptive or dense."""
    calibration_text: str | None = None
    """Calibrate on this file, not on the model's own samples."""

    def load(self, model: str, **options: Any) -> Any:
        """Return the model under the policy."""
        from anee_core.calibration.options import CalibrationOptions

        calibration = CalibrationOptions(text=self.calibration_text)
        own = {"hard": self.hard, "weights": self.weights, "prefill": self.prefill, "calibration": calibration}
        return super().load(model, **own, **options)


@dataclass(frozen=True)
class Shown:
    """What is shown of a continuation."""

    stream: bool = False
    """Print tokens as they come."""
    as_json: bool = False
    """Print one JSON object."""
    picture: bool = False
    """Draw which layers ran for which token."""


@flat
def generate(
    model: Model,
    prompt: Prompt,
    loading: Annotated[GenerateLoading, Flags(short={"policy": "-p", "budget": "-b"})],
    continuation: Annotated[Continuation, Flags(short={"max_new_tokens": "-n"})],
    shown: Annotated[Shown, Flags(rename={"as_json": "json"})],
) -> None:
    """Continue a prompt, and say what ran."""
    from transformers import TextStreamer  # heavy: imported where used, so that help and listings are instant

    adaptive = loading.load(model)
    show_stream = shown.stream and not shown.as_json
    extra: dict[str, Any] = (
        {"streamer": TextStreamer(adaptive.tokenizer, skip_special_tokens=True)} if show_stream else {}
    )
    result = continuation.of(adaptive, prompt, **extra)
    if shown.as_json:
        report = {
            "model": model,
            "policy": adaptive.policy.title,
            "budget": adaptive.budget,
            "text": result.text,
            "completion": result.completion,
            "new_tokens": result.new_tokens[0],
            "tokens_per_second": result.tokens_per_second,
            "trace": result.trace.to_dict(),
        }
        print(json.dumps(report))
        return
    if not show_stream:
        print(result.text)
    console = Console(stderr=True, highlight=False)
    console.print(f"\n[bold]{escape(adaptive.policy.title)}[/bold], budget {adaptive.budget or 'none'}", markup=True)
    console.print(str(result.trace), markup=False)
    console.print(f"{result.tokens_per_second:.1f} tokens/s", markup=False)
    if shown.picture:
        console.print(result.trace.draw(), markup=False)
