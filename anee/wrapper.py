"""`ANEEWrapper`: the first system's front door, kept working."""

from __future__ import annotations

import logging
from typing import Any

from anee.config import ANEEConfig
from anee_core.errors import BudgetError
from anee_core.load import load

logger = logging.getLogger(__name__)


class ANEEWrapper:
    """A model under a budget, by configuration.

    A budget below the least that the model can be run with is taken as that, and said once, after the first generation:
    this door never refused one.

    >>> model = ANEEWrapper(ANEEConfig(model_name="gpt2-xl", energy_budget=0.2)).eval()
    >>> text = model.generate(tokenizer=tokenizer, prompt="The future of AI", max_new_tokens=30)
    """

    def __init__(self, config: ANEEConfig) -> None:
        self.config = config
        dense = load(config.model_name, device=config.device, dtype=config.dtype)
        self._raised = False
        """Whether the budget was raised, and nobody has been told."""
        try:
            self.model = load(dense.model, config.policy, config.energy_budget, tokenizer=dense.tokenizer)
        except BudgetError as error:
            if error.least is None:
                raise
            self._raised = True
            self.model = load(dense.model, config.policy, error.least, tokenizer=dense.tokenizer)
        self.model.name = dense.name

    def eval(self) -> ANEEWrapper:
        """Put the model in evaluation mode."""
        self.model.eval()
        return self

    def generate(self, prompt: str, tokenizer: Any = None, max_new_tokens: int = 30, **options: Any) -> str:
        """Return the prompt and its continuation as text; ``options`` as in `AdaptiveModel.generate`."""
        if tokenizer is not None:
            self.model.tokenizer = tokenizer
        result = self.model.generate(prompt, max_new_tokens=max_new_tokens, **options)
        if self._raised:
            self._raised = False
            logger.warning(
                "energy_budget=%g cannot be met by this model: the least possible is %.3f, and %.3f was spent",
                self.config.energy_budget, self.model.budget, result.trace.budget_spent,
            )  # fmt: skip
        text: str = result.text
        return text
