"""Train what skips layers and what drops tokens, for one model; then use both together.

python examples/train_both.py --text book.txt --folder trained
python examples/train_both.py --text book.txt --folder trained --model FOLDER --steps 300

The model itself stays as it is. An interrupted run goes on when the command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anee
from anee_core.evaluation import dense_logits, text_blocks, text_quality
from anee_core.training.asa_run import train_asa
from anee_core.training.gate_run import train_gate
from anee_core.training.options import AsaOptions, GateOptions, GateTraining
from anee_core.training.run_options import RunOptions


def main() -> None:
    """Train both, and compare on the text's first blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="model source, hub id or local folder")
    parser.add_argument("--text", type=Path, required=True, help="what to learn from, UTF-8")
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and results")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--budget", type=float, default=0.8)
    parser.add_argument("--rank", type=int, default=32)
    arguments = parser.parse_args()
    folder, steps, length = arguments.folder, arguments.steps, arguments.length
    model = anee.load(arguments.model, dtype="float32")

    tokens = RunOptions(folder / "asa", steps, validate_every=0)
    train_asa(model, [arguments.text], tokens, AsaOptions(target=0.6, length=length, rank=arguments.rank))
    layers = RunOptions(folder / "gate", steps, validate_every=0)
    gate = GateTraining(GateOptions(least=arguments.budget - 0.1), arguments.rank, length, calibration_sequences=8)
    train_gate(model, [arguments.text], layers, gate)

    blocks = text_blocks(model, arguments.text, length, 4)
    dense = dense_logits(model, blocks)
    skip, drop = f"gate:{folder / 'gate'}+shortcuts:{folder / 'gate'}", f"asa:{folder / 'asa'}"
    for policy in ("dense", skip, drop, f"{skip}+{drop}"):
        budget = arguments.budget if "gate" in policy and policy != drop else None
        quality = text_quality(anee.load(model.model, policy, budget), blocks, dense=dense)
        print(
            f"{policy}\n  perplexity {quality.perplexity:.2f}, KL to dense {quality.divergence:.4f}, "
            f"spent {quality.spent:.1%}, context dropped {quality.dropped:.1%}"
        )


if __name__ == "__main__":
    main()
