"""`ANEEWrapper`: the first system's front door, kept working."""

from __future__ import annotations

from typing import Any

from anee.config import ANEEConfig
from anee_core.load import load


class ANEEWrapper:
    """A model under a budget, by configuration.

    >>> model = ANEEWrapper(ANEEConfig(model_name="gpt2-xl", energy_budget=0.4)).eval()
    >>> text = model.generate(tokenizer=tokenizer, prompt="The future of AI", max_new_tokens=30)
    """

    def __init__(self, config: ANEEConfig) -> None:
        self.config = config
        self.model = load(
            config.model_name,
            policy=config.policy,
            budget=config.energy_budget,
            device=config.device,
            dtype=config.dtype,
        )

    def eval(self) -> ANEEWrapper:
        """Put the model in evaluation mode."""
        self.model.eval()
        return self

    def generate(self, prompt: str, tokenizer: Any = None, max_new_tokens: int = 30, **options: Any) -> str:
        """Return the prompt and its continuation as text; ``options`` as in `AdaptiveModel.generate`."""
        if tokenizer is not None:
            self.model.tokenizer = tokenizer
        text: str = self.model.generate(prompt, max_new_tokens=max_new_tokens, **options).text
        return text
