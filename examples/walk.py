"""A walk through the picture of a generation.

Cells are marked the way editors know, so that this file opens as a notebook. As a script:

python examples/walk.py --model smollm2 --policy heuristic --budget 0.85
"""

# %% What to look at
import argparse
from pathlib import Path

import torch

import anee
from anee_core.evaluation import replay, write_report

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="smollm2")
parser.add_argument("--policy", default="heuristic")
parser.add_argument("--budget", type=float, default=None)
parser.add_argument("--out", type=Path, default=Path("walk.html"))
arguments, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own

# %% Generate: the trace is what really ran
model = anee.load(arguments.model, arguments.policy, arguments.budget)
result = model.generate("The history of the city begins with", max_new_tokens=24)
print(result.text)
print(result.trace)

# %% Token x layer: one line per token, one mark per layer, filled where the layer ran
print(result.trace.draw())

# %% Which layers run most
ran = result.trace.ran[:, 0]  # [L, T]
for layer, share in enumerate(ran.float().mean(1).tolist()):
    print(f"layer {layer:>2} {'#' * round(40 * share)} {share:.0%}")

# %% Run it again, looking inside: how sure the model was, and how deep it went
ids = result.sequences[0, : ran.shape[1]]
seen = replay(model, ids, len(ids) + 1 - len(result.new_tokens[0]))
for token, depth, entropy in zip(seen.tokens, seen.ran.sum(0).tolist(), seen.entropy.tolist(), strict=True):
    print(f"{token!r:>14} {depth:>3} layers, entropy after it {entropy:.2f}")

# %% What each layer changed, where it ran
change = torch.where(seen.ran, seen.change, torch.nan).nanmean(1)
print("relative change by layer:", [round(x, 2) for x in change[:-1].tolist()])

# %% The same as a page to click on
print("wrote", write_report(model, ids, seen.prompt, arguments.out))
