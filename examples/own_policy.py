"""Write a layer policy and use it: run every layer for one token in N, and every other layer for the rest.

python examples/own_policy.py
python examples/own_policy.py --model FOLDER --every 4
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import anee
from anee_core.interfaces import Action, Controller, DecisionContext, protect_ends


@dataclass(frozen=True)
class RhythmController(Controller):
    """Skip the odd layers, but for one token in ``every``. Fields are the policy's options."""

    name: ClassVar[str] = "rhythm"
    every: int = 3

    def protected(self, num_layers: int) -> frozenset[int]:
        """Keep the first two and the last two layers."""
        return protect_ends((2, 2), num_layers)

    def decide(self, signals: Tensor, context: DecisionContext) -> Tensor:
        """Return actions [N, B, T] for all layers at once: nothing here depends on the hidden states."""
        layers = torch.arange(context.layer_idx, context.num_layers, device=signals.device)[:, None, None]
        skip = (layers % 2 == 1) & (context.position_ids % self.every != 0)
        return skip.to(torch.uint8) * int(Action.SKIP)


def main() -> None:
    """Generate under the policy and draw what ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="model source, hub id or local folder")
    parser.add_argument("--every", type=int, default=3)
    arguments = parser.parse_args()
    model = anee.load(arguments.model, policy=RhythmController(every=arguments.every))
    result = model.generate("The Roman Empire was", max_new_tokens=20)
    print(result.text)
    print(result.trace)
    print(result.trace.draw())


if __name__ == "__main__":
    main()
