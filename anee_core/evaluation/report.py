"""One generation as a web page that needs no network: which token got which depth, what was kept, what was spent."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anee_core.accounting.trace import Trace
from anee_core.errors import InputError, MissingPackageError
from anee_core.files import writable, write_whole
from anee_core.policy.profiler import ENTROPY, MAX_PROBABILITY, distribution_signals

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from anee_core.model.adaptive_model import AdaptiveModel


_CONFIG = {"responsive": True, "displayModeBar": False}
_HEIGHT = 16
"""Pixels of a layer in a picture."""


@dataclass(frozen=True)
class Replay:
    """A sequence of T tokens as it was read and generated."""

    tokens: list[str]
    """Text of each token."""
    prompt: int
    """Number of tokens of the prompt."""
    trace: Trace
    """Record of the replay."""
    ran: Tensor
    """Which layers ran, [L, T] bool."""
    held: Tensor
    """Slots that each layer held after each token, [L, T]."""
    change: Tensor
    """How much each layer changed the hidden state, relative to its norm, [L, T]; the last layer's is unknown."""
    entropy: Tensor
    """Entropy of the next-token distribution after each token, as a share of log(vocabulary), [T]."""
    confidence: Tensor
    """Largest probability of that distribution, [T]."""
    spent: Tensor
    """What each token spent of a dense one's decoder-layer FLOPs, [T]."""


@torch.inference_mode()
def replay(model: AdaptiveModel, input_ids: Tensor, prompt: int) -> Replay:
    """Run token ids [T] again as `generate` did: a prompt of ``prompt`` tokens, then one token after the other.

    Raises:
        InputError: there is no token, or the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise InputError("a report shows text: the model needs a tokenizer")
    if input_ids.dim() != 1 or not 1 <= prompt <= len(input_ids):
        raise InputError(
            f"a report is of token ids [T] that begin with a prompt; got {list(input_ids.shape)}, {prompt}"
        )
    cache, states, logits = model.new_cache(len(input_ids)), [], []
    with model.recording(cache, prompt) as trace:
        for part in (input_ids[:prompt], *input_ids[prompt:, None]):
            output = model(part[None], past_key_values=cache, output_hidden_states=True)
            states.append(torch.stack([state[0] for state in output.hidden_states[:-1]]))
            logits.append(output.logits[0])
    inputs = torch.cat(states, dim=1).float().cpu()  # [L, T, D]
    change = inputs.diff(dim=0).norm(dim=-1) / inputs[:-1].norm(dim=-1).clamp(min=1e-6)
    signals = distribution_signals(torch.cat(logits)).cpu()
    return Replay(
        tokens=[model.tokenizer.decode([i]) for i in input_ids.tolist()],
        prompt=prompt,
        trace=trace,
        ran=trace.ran[:, 0].cpu(),
        held=trace.held[:, 0],
        change=torch.cat((change, torch.full_like(change[:1], torch.nan))),
        entropy=signals[:, ENTROPY],
        confidence=signals[:, MAX_PROBABILITY],
        spent=model.engine.costs.spent_shares(trace.ran)[0].cpu(),
    )


def write_report(model: AdaptiveModel, input_ids: Tensor, prompt: int, path: str | Path) -> Path:
    """Write the page of a generated sequence of token ids [T], prompt included, and return its path.

    Raises:
        InputError: see `replay`.
        MissingPackageError: plotly is not installed.
    """
    try:
        import plotly.io as pio
    except ImportError as error:
        raise MissingPackageError("reports need plotly: pip install 'anee[report]'") from error
    seen = replay(model, input_ids, prompt)
    figures = {
        "layers": _map(seen.ran.int(), seen, "ran", [[0, "#e8edf2"], [1, "#1f5f99"]], bar=False),
        # First layers change the most by far, and would leave one colour for the rest.
        "change": _map(seen.change, seen, "change", "Viridis", top=float(seen.change.nan_to_num().quantile(0.9))),
        "kept": _map(seen.held, seen, "slots held", "Cividis"),
        "budget": _budget(seen, model.budget),
        "signals": _lines({"entropy": seen.entropy, "largest probability": seen.confidence}, seen),
    }
    parts: dict[str, str] = {}
    for i, (name, figure) in enumerate(figures.items()):
        source: Any = "inline" if i == 0 else False
        parts[name] = pio.to_html(figure, full_html=False, include_plotlyjs=source, div_id=name, config=_CONFIG)
    facts = {"model": model.name, "policy": model.policy.title, "budget": model.budget or "none"}
    template = Template(Path(__file__).with_name("report_page.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=html.escape(f"{facts['policy']} on {facts['model']}"),
        facts="".join(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items()),
        totals=html.escape(str(seen.trace)),
        text=_text(seen),
        maps=json.dumps(["layers", "change", "kept"]),
        **parts,
    )
    path = writable(Path(path))
    write_whole(path, page)
    return path


def _text(seen: Replay) -> str:
    """Return the tokens as spans, the darker the more layers ran."""
    depth = seen.ran.float().mean(0)
    spans = []
    for i, (token, share) in enumerate(zip(seen.tokens, depth.tolist(), strict=True)):
        kind = "prompt" if i < seen.prompt else "new"
        note = f"{int(seen.ran[:, i].sum())} of {len(seen.ran)} layers, entropy after it {seen.entropy[i]:.2f}"
        shown = html.escape(token).replace("\n", "\u21b5<br>")
        style = f"background:rgba(31,95,153,{0.05 + 0.75 * share:.3f});color:{'#fff' if share > 0.6 else '#111'}"
        spans.append(f'<span class="{kind}" data-token="{i}" style="{style}" title="{note}">{shown}</span>')
    return "".join(spans)


def _labels(seen: Replay) -> list[str]:
    return [f"{i}: {token!r}" for i, token in enumerate(seen.tokens)]


def _map(
    values: Tensor, seen: Replay, name: str, colours: Any, bar: bool = True, top: float | None = None
) -> go.Figure:
    """Return a picture of values [L, T]; from ``top`` on they share one colour."""
    import plotly.graph_objects as go

    labels = [_labels(seen)] * len(values)
    heat = go.Heatmap(
        z=values.tolist(),
        customdata=labels,
        colorscale=colours,
        showscale=bar,
        zmin=0,
        zmax=top,
        hovertemplate="%{customdata}<br>layer %{y}<br>" + name + " %{z:.3~g}<extra></extra>",
    )
    figure = go.Figure(heat)
    figure.update_layout(
        height=110 + _HEIGHT * len(values), xaxis_title="token", yaxis_title="layer", margin={"t": 10, "b": 40}
    )
    return figure


def _budget(seen: Replay, budget: float | None) -> go.Figure:
    """Return a picture of what tokens spent, and of the mean so far."""
    mean = seen.spent.cumsum(0) / torch.arange(1, len(seen.spent) + 1)
    figure = _lines({"this token": seen.spent, "mean so far": mean}, seen)
    if budget is not None:
        figure.add_hline(y=budget, line_dash="dash", annotation_text="budget")
    figure.update_layout(yaxis_title="share of dense layer FLOPs")
    return figure


def _lines(values: dict[str, Tensor], seen: Replay) -> go.Figure:
    """Return a picture of curves [T] over the tokens."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, curve in values.items():
        figure.add_scatter(
            y=curve.tolist(), name=name, customdata=_labels(seen), hovertemplate="%{customdata}<br>%{y:.3f}"
        )
    figure.add_vline(x=seen.prompt - 0.5, line_width=1, line_dash="dot", annotation_text="end of the prompt")
    figure.update_layout(height=280, xaxis_title="token", margin={"t": 20, "b": 40})
    return figure
