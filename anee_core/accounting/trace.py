"""The record of what ran: layers, tokens, FLOPs and bytes of one call, as numbers, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from anee_core.accounting.meter import Meter, Spent
from anee_core.display import new_figure, save_figure


@dataclass(frozen=True)
class Step:
    """The record of one forward."""

    ran: Tensor
    """[L, B, T] bool: which tokens ran each layer."""
    real: Tensor
    """[B, T] bool: which tokens are real and no padding."""
    meter: Meter
    """The count of what was executed."""
    phase: Literal["prefill", "decode"]
    """Whether the forward read a prompt or decoded tokens."""
    dense: bool
    """Whether it read a prompt densely on request: with every layer, whatever the policy."""
    held: Tensor
    """[L, B, T] slots that each layer held after each token."""
    kv_bytes: list[int]
    """Bytes that each layer had allocated in the end, for keys, values and what a policy remembers of them."""

    @property
    def spent(self) -> Spent:
        """The work of the forward."""
        return self.meter.total()


class Trace:
    """The record of one call: a forward, or all forwards of one generation.

    Counts are of what was executed. Rows are those of the forwards; a beam search's rows are its beams as they ran.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.kv_bytes = 0
        """Bytes allocated for keys and values at the end of the call."""
        self.kept = torch.zeros(0, 0, dtype=torch.long)
        """Valid slots of each layer and row at the end of the call, [L, B]."""
        self.tokens: list[list[str]] | None = None
        """Text of the tokens that were fed in, per row, if known: labels of the picture."""
        self.rows: tuple[int, Tensor] | None = None
        """Number of rows of the call and which of them the coming forwards run; None for all."""

    def add(self, step: Step) -> None:
        """Record one forward."""
        if self.rows is not None:
            batch, rows = self.rows
            ran, real, held = step.ran, step.real, step.held
            ran = ran.new_zeros(ran.shape[0], batch, ran.shape[2]).index_copy_(1, rows, ran)
            real = real.new_zeros(batch, real.shape[1]).index_copy_(0, rows, real)
            held = held.new_zeros(held.shape[0], batch, held.shape[2]).index_copy_(1, rows.to(held.device), held)
            step = replace(step, ran=ran, real=real, held=held)
        self.steps.append(step)

    def close(self, kv_bytes: int, kept: Tensor) -> None:
        """Record what the cache holds at the end of the call: bytes, and slots of each layer and row, [L, B]."""
        self.kv_bytes, self.kept = kv_bytes, kept

    @property
    def ran(self) -> Tensor:
        """Which tokens ran each layer, [L, B, T] bool; padding did not, nor rows that had ended."""
        return _join([step.ran for step in self.steps])

    @property
    def real(self) -> Tensor:
        """Which tokens are real rather than padding, [B, T] bool."""
        return _join([step.real[None] for step in self.steps])[0]

    def spent(self, phase: Literal["prefill", "decode"] | None = None) -> Spent:
        """Return the work of all steps, or of those of one phase."""
        total = Spent()
        for step in self.steps:
            if phase in (None, step.phase):
                total.add(step.spent)
        return total

    @property
    def held(self) -> Tensor:
        """Slots that each layer held after each token, [L, B, T]; 0 for rows that had ended."""
        return _join([step.held.cpu() for step in self.steps])

    @property
    def kv_bytes_by_step(self) -> Tensor:
        """Bytes allocated by each layer after each forward, [steps, L]."""
        return torch.tensor([step.kv_bytes for step in self.steps])

    @property
    def context_dropped(self) -> float:
        """Share of the context that layers did not hold: of all pairs of a token and one before it in its row."""
        before = self.real.cumsum(1) - 1
        pairs = int((before * self.real).sum()) * len(self.held)
        return 1 - float(((self.held - 1) * self.real).sum()) / pairs if pairs else 0.0

    @property
    def budget_spent(self) -> float:
        """Share of the dense decoder-layer FLOPs that was executed.

        What skipped layers cost counts as well: their keys and values, and shortcuts. The tokens of a prompt that was
        read densely on request are left out: no budget was set for them.
        """
        total = Spent()
        for step in self.steps:
            if not step.dense:
                total.add(step.spent)
        return total.share if total.dense_layer_flops else self.spent().share

    @property
    def layers_run(self) -> float:
        """Share of (layer, token) pairs that ran, over the tokens under the policy."""
        steps = [s for s in self.steps if not s.dense] or self.steps
        pairs = sum(int(s.real.sum()) * s.ran.shape[0] for s in steps)
        return sum(int(s.ran.sum()) for s in steps) / pairs if pairs else 0.0

    @property
    def flops(self) -> dict[str, int]:
        """Executed FLOPs by part, their sum ``spent``, and the ``dense`` model's for the same tokens."""
        s = self.spent()
        shared = s.head_flops + s.embedding_flops
        return {
            "layers": s.layer_flops,
            "propagation": s.propagation_flops,
            "shortcuts": s.shortcut_flops,
            "token_policy": s.policy_flops,
            "head": s.head_flops,
            "embedding": s.embedding_flops,
            "spent": s.layer_flops + s.propagation_flops + s.shortcut_flops + s.policy_flops + shared,
            "dense": s.dense_layer_flops + shared,
        }

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights read by part, their sum ``spent``, and the ``dense`` model's for the same tokens."""
        s = self.spent()
        shared = s.head_bytes + s.embedding_bytes
        return {
            "layers": s.layer_bytes,
            "propagation": s.propagation_bytes,
            "shortcuts": s.shortcut_bytes,
            "head": s.head_bytes,
            "embedding": s.embedding_bytes,
            "spent": s.layer_bytes + s.propagation_bytes + s.shortcut_bytes + shared,
            "dense": s.dense_layer_bytes + shared,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and lists, ready for JSON."""
        return {
            "budget_spent": self.budget_spent,
            "layers_run": self.layers_run,
            "flops": self.flops,
            "weight_bytes": self.weight_bytes,
            "kv_bytes": self.kv_bytes,
            "kept": self.kept.tolist(),
            "context_dropped": self.context_dropped,
            "kv_bytes_by_step": [sum(step.kv_bytes) for step in self.steps],
            "ran": self.ran.int().tolist(),
            "tokens": self.tokens,
        }

    def __str__(self) -> str:
        """Return a short table."""
        flops, weights = self.flops, self.weight_bytes
        held = self.kept.float()
        lines = [
            ("tokens", f"{int(self.real.sum())}{self._dense_note()}"),
            ("layers run per token", f"{self.layers_run:.1%}"),
            ("decoder-layer FLOPs", f"{self.budget_spent:.1%} of dense"),
            ("FLOPs spent", f"{_units(flops['spent'])} of {_units(flops['dense'])} dense"),
            ("  layers", _units(flops["layers"])),
            ("  K/V of skipped layers", _units(flops["propagation"])),
            ("  shortcuts", _units(flops["shortcuts"])),
            ("  token policy", _units(flops["token_policy"])),
            ("  head and embedding", _units(flops["head"] + flops["embedding"])),
            ("FLOPs saved", f"{_units(flops['dense'] - flops['spent'])} ({1 - _ratio(flops):.1%})"),
            ("weights read", f"{_units(weights['spent'])}B of {_units(weights['dense'])}B dense"),
            ("context dropped", f"{self.context_dropped:.1%}"),
            ("K/V cache", f"{_units(self.kv_bytes)}B, {held.mean().item() if held.numel() else 0:.1f} slots per row"),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)

    def _dense_note(self) -> str:
        dense = sum(int(s.real.sum()) for s in self.steps if s.dense)
        return f", {dense} of them a prompt read densely" if dense else ""

    def draw(self, row: int = 0, tokens: Sequence[str] | None = None, last: int | None = None) -> str:
        """Return the token x layer picture of one row: a line per token, a mark per layer, filled where it ran.

        Args:
            row: which row.
            tokens: texts of the tokens. Default: as the trace knows them.
            last: how many of the last tokens are shown. Default: all.
        """
        ran, real = self.ran, self.real
        labels = tokens if tokens is not None else (self.tokens[row] if self.tokens else None)
        lines = []
        columns = real[row].nonzero()[:, 0].tolist()
        for t in columns[-last:] if last else columns:
            label = repr(labels[t])[1:-1] if labels is not None and t < len(labels) else f"token {t}"
            marks = "".join("█" if on else "·" for on in ran[:, row, t].tolist())
            lines.append(f"{label[:16]:>16} {marks} {int(ran[:, row, t].sum()):>3}")
        layers = ran.shape[0]
        ruler = "".join(f"{i:<5}" for i in range(0, layers, 5))[:layers]
        return "\n".join([f"{'layer':>16} {ruler}", *lines])

    def plot(self, path: str, row: int = 0) -> None:
        """Save the token x layer picture of one row as an image.

        Raises:
            InputError, OutputError: the image cannot be written there.
            MissingPackageError: matplotlib is not installed.
        """
        columns = self.real[row].nonzero()[:, 0]
        ran = self.ran[:, row, columns]
        figure = new_figure(max(4.0, 0.22 * ran.shape[1] + 1.5), max(3.0, 0.16 * ran.shape[0] + 1))
        axes = figure.subplots()
        axes.imshow(ran.numpy(), cmap="Blues", aspect="auto", vmin=0, vmax=1.4, interpolation="nearest")
        axes.set_ylabel("layer")
        if self.tokens:
            labels = [self.tokens[row][t] if t < len(self.tokens[row]) else "" for t in columns.tolist()]
            axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        axes.set_title(f"layers run: {self.layers_run:.0%} of (layer, token) pairs", fontsize=9)
        figure.tight_layout()
        save_figure(figure, Path(path), dpi=150)


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=-1) if parts else torch.zeros(1, 0, 0, dtype=torch.bool)


def _ratio(parts: dict[str, int]) -> float:
    return parts["spent"] / parts["dense"] if parts["dense"] else 0.0


def _units(number: float) -> str:
    """Write a count with a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} P"
