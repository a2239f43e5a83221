"""A saved policy with a card that says what was measured, as the model hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from anee_core.evaluation.text_quality import TextQuality
from anee_core.files import write_whole
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.policy.hub import is_repository


@dataclass(frozen=True)
class Measured:
    """What was measured on one text."""

    policy: TextQuality
    """Figures of the policy."""
    dense: float
    """Perplexity of the dense model."""
    tokens: int
    """Number of tokens of the text."""


def save_with_card(
    model: AdaptiveModel, folder: str | Path, measured: Mapping[str, Measured], place: str | None = None
) -> Path:
    """Save a model's policy with a card, and return the folder.

    Args:
        model: runs under the policy that is saved.
        folder: where it is saved.
        measured: what was measured, by the name of the text.
        place: where the card says that the policy is. Default: the folder.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    model.policy.save(folder)
    write_whole(folder / "README.md", card(model, place or str(folder), measured))
    return folder


def card(model: AdaptiveModel, place: str, measured: Mapping[str, Measured]) -> str:
    """Return the text of the card of a policy that is kept at ``place``, a repository or a folder."""
    name = getattr(model.config, "_name_or_path", "") or ""
    base = name if is_repository(name) and not Path(name).exists() else None
    data = ModelCardData(library_name="anee", tags=["anee", "adaptive-computation"], base_model=base)
    budget = "" if model.budget is None else f", at a budget of {model.budget:g}"
    lines = [
        "---", data.to_yaml(), "---", "",
        f"# {model.policy.title} for {base or model.name}", "",
        f"What ANEE runs the model under{budget}.", "",
        "```python",
        "import anee", "",
        f'model = anee.load("{base or "MODEL"}", policy="{place}")',
        "```", "",
    ]  # fmt: skip
    if measured:
        lines += [
            "## Measured", "",
            "| text | tokens | layer FLOPs | pairs skipped | context dropped | perplexity | dense | KL to dense |",
            "|" + "---|" * 8,
        ]  # fmt: skip
    for text, found in measured.items():
        q = found.policy
        lines.append(
            f"| {text} | {found.tokens:,} | {q.spent:.1%} | {q.skipped:.1%} | {q.dropped:.1%} | {q.perplexity:.2f} "
            f"| {found.dense:.2f} | {q.divergence:.4f} |"
        )
    return "\n".join(lines) + "\n"
