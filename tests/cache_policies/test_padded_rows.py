"""Token policies on padded rows: padding is never a token's turn, wherever it stands."""

import pytest
import torch
from tiny import adaptive, shared, tokens

LENGTHS = range(3, 15)
TOKEN_POLICIES = (
    "window:sinks=1,recent=4",
    "window:sinks=1,keep=0.4,least=1",
    "h2o:keep=0.4,least=1",
    "tova:keep=0.4,least=1",
    "knorm:keep=0.4,least=1,recent=2",
    "random_tokens:keep=0.4,least=1",
    "snapkv:keep=0.4,least=1,every=4,window=2,pool=3",
    "snapkv:keep=3,every=5,window=3,pool=1",
    "snapkv:keep=3,every=3,window=3,pool=1,sinks=1",
)
CLOSE = {"atol": 5e-5, "rtol": 1e-3}


def places(length, width, side):
    """Return where a row's tokens stand among ``width`` columns."""
    if side == "left":
        return list(range(width - length, width))
    if side == "right":
        return list(range(length))
    gap = (width - length) // 2  # some padding in front, some behind the first half
    half = length // 2
    return [*range(gap, gap + half), *range(width - length + half, width)]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "gaps"])
@pytest.mark.parametrize("policy", TOKEN_POLICIES)
def test_rows_of_any_length_are_what_they_are_alone(policy, side):
    model, width = adaptive(shared("llama"), policy), max(LENGTHS) + 4
    rows = [tokens(1, length + 3, seed=length) for length in LENGTHS]
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (row, length) in enumerate(zip(rows, LENGTHS, strict=True)):
        at = places(length, width, side)
        ids[i, at], mask[i, at] = row[0, :length], 1
    padded = model(ids, attention_mask=mask)
    found = [padded.logits[i][mask[i].bool()] for i in range(len(rows))]
    cache = padded.past_key_values
    for step in range(3):
        fed = torch.cat([row[:, length + step, None] for row, length in zip(rows, LENGTHS, strict=True)])
        logits = model(fed, past_key_values=cache).logits
        found = [torch.cat((before, new)) for before, new in zip(found, logits, strict=True)]
    for i, row in enumerate(rows):
        torch.testing.assert_close(found[i], model(row).logits[0], **CLOSE, msg=f"{len(row[0]) - 3} tokens")
