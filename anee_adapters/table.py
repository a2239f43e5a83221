"""A family that is a table of names and nothing more."""

from __future__ import annotations

from typing import Any

from anee_core.interfaces import Layout, ModelAdapter, Recipe


class TableAdapter(ModelAdapter):
    """The adapter of a family whose layers are called as most are.

    Args:
        layout: where its parts are.
        recipe: what its layers compute, if a recipe says it.
    """

    def __init__(self, layout: Layout, recipe: Recipe | None = None) -> None:
        self.layout, self._recipe = layout, recipe

    def recipe(self, config: Any) -> Recipe | None:
        """Return the recipe of the table."""
        return self._recipe
