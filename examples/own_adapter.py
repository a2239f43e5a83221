"""Teach ANEE a family that it does not know, StableLM: a table of names, checked against transformers itself.

python examples/own_adapter.py
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, StableLmConfig

from anee_core.conformance import ADAPTER_CHECKS, Subject, run_checks
from anee_core.controllers import StaticController
from anee_core.interfaces import Layout, ModelAdapter
from anee_core.model import AdaptiveModel
from anee_core.policy import Policy

SMALL = StableLmConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


class StableLmAdapter(ModelAdapter):
    """Where StableLM keeps what every decoder has."""

    layout = Layout(
        layers="model.layers",
        final_norm="model.norm",
        rotary="model.rotary_emb",
        attention="self_attn",
    )


def main() -> None:
    """Check the adapter on a small random model, then skip layers with it. A plugin registers it for `anee.load`."""
    report = run_checks([("stablelm", "stablelm", Subject(StableLmAdapter(), SMALL))], ADAPTER_CHECKS)
    for result in report.results:
        print(f"{'passed' if result.passed else 'FAILED'}  {result.check}")
    model = AdaptiveModel(AutoModelForCausalLM.from_config(SMALL).eval(), StableLmAdapter())
    model.set_policy(Policy(StaticController(skip=(2, 4))))
    with torch.no_grad():
        model(torch.arange(12)[None])
    print(model.last_trace)


if __name__ == "__main__":
    main()
