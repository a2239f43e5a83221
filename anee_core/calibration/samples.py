"""Tokens to calibrate on: the model's own samples, or pieces of a text file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anee_core.accounting.trace import Trace
from anee_core.engine.block import Block
from anee_core.engine.engine import Engine
from anee_core.errors import InputError
from anee_core.files import read_text

if TYPE_CHECKING:
    from anee_core.model.adaptive_model import AdaptiveModel


def own_samples(
    model: AdaptiveModel, engine: Engine, sequences: int, length: int, seed: int, advance: Callable[[], None]
) -> Tensor:
    """Let a model write [sequences, length] tokens, each from its own first token.

    ``engine`` runs it, densely or under a policy; ``advance`` is called for every position.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    vocabulary = int(model.config.vocab_size)
    start = getattr(model.config, "bos_token_id", None)
    shape = (sequences, 1)
    tokens = torch.randint(vocabulary, shape, device=model.device, generator=generator)
    if isinstance(start, int) and 0 <= start < vocabulary:
        tokens = torch.full(shape, start, device=model.device)
    cache, trace = model.new_cache(length), Trace()
    advance()
    while tokens.shape[1] < length:
        output = engine.run(prompt_block(model, tokens[:, -1:], tokens.shape[1] - 1), cache, trace)
        logits = engine.logits(output.hidden_states, trace)[:, -1].float()
        tokens = torch.cat((tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)), dim=1)
        advance()
    return tokens


def samples_of_file(model: AdaptiveModel, path: Path, sequences: int, length: int) -> Tensor:
    """Read [sequences, length] tokens, spread evenly over a text file.

    Raises:
        InputError: the model has no tokenizer, or the file cannot be read or is too short.
    """
    if model.tokenizer is None:
        raise InputError("calibrating on a text file needs a tokenizer: pass one to anee.load")
    text = read_text(path, "calibration text")
    need = sequences * length
    stride = max(len(text) // sequences, 1)
    rows = []
    for i in range(sequences):
        # A token is seldom longer than 16 characters; that bounds what has to be tokenised.
        ids = model.tokenizer(text[i * stride : (i + 1) * stride][: 16 * length])["input_ids"]
        rows.append(ids[:length])
    if any(len(row) < length for row in rows):
        raise InputError(f"{path} is too short: {need} tokens are needed; give a longer text or calibrate on fewer")
    return torch.tensor(rows, device=model.device)


def prompt_block(model: AdaptiveModel, tokens: Tensor, seen: int) -> Block:
    """Return tokens [B, T] that come after ``seen`` others, ready for the engine."""
    positions = torch.arange(seen, seen + tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
    return Block(model.parts.embedding(tokens), positions, tokens, None, "prefill")
