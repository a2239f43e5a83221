"""What a generation produced."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from anee_core.accounting.trace import Trace
from anee_core.errors import InputError


@dataclass
class Generation:
    """What a generation produced."""

    sequences: Tensor
    """[B, T + N] prompts and new tokens, padded behind a row's end."""
    new_tokens: list[list[int]]
    """New tokens of each row, without padding."""
    trace: Trace
    """Record of what ran."""
    prompt_seconds: float = 0.0
    """Seconds until the first new token; 0 where transformers' ``generate`` did the work."""
    decode_seconds: float = 0.0
    """Seconds of all further tokens; of the whole work where transformers' ``generate`` did it."""
    texts: list[str] = field(default_factory=list)
    """Each row as text, with its prompt; empty where only token ids were asked for."""
    completions: list[str] = field(default_factory=list)
    """Each row as text, without its prompt; empty likewise."""

    @property
    def text(self) -> str:
        """The first row as text, prompt included."""
        if not self.texts:
            raise InputError("there is no text: only ids were asked for, or the model has no tokenizer; use .sequences")
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
