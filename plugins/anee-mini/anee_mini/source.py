"""Loads the weights that are in this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from anee_core.hookspecs import SourceRequest

WEIGHTS = Path(__file__).parent / "weights"


def load_mini(request: SourceRequest) -> tuple[Any, Any]:
    """Return the model and its tokenizer."""
    model = GPT2LMHeadModel.from_pretrained(WEIGHTS, dtype=request.dtype or torch.float32)
    if request.device is not None:
        model = model.to(request.device)
    return model, AutoTokenizer.from_pretrained(WEIGHTS)
