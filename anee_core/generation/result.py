"""What a generation produced."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from anee_core.accounting.trace import Trace
from anee_core.errors import InputError


@dataclass
class Generation:
    """What a generation produced.

    ``sequences`` [B, T + N] holds prompts and new tokens, padded behind a row's end; ``new_tokens`` each row's new
    tokens without padding; ``texts`` and ``completions`` each row as text, with and without its prompt. Times are in
    seconds; the first new token belongs to the prompt's. Where transformers' ``generate`` did the work, all of it
    counts as ``decode_seconds``.
    """

    sequences: Tensor
    new_tokens: list[list[int]]
    trace: Trace
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    texts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The first row as text, prompt included."""
        if not self.texts:
            raise InputError("there is no text: the model has no tokenizer; use .sequences")
        return self.texts[0]

    @property
    def completion(self) -> str:
        """The first row's new text."""
        return self.completions[0] if self.text else ""

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of all rows together, the prompt and the first new token left out."""
        count = sum(max(len(row) - 1, 0) for row in self.new_tokens)
        return count / self.decode_seconds if self.decode_seconds else 0.0
