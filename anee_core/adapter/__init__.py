"""What ANEE knows of a model family: a table of names, and defaults that need nothing more."""

from anee_core.adapter.layer_call import LayerCall
from anee_core.adapter.layout import Layout, Parts
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.adapter.recipe import Recipe
from anee_core.adapter.rotary import rotate, rotate_interleaved

__all__ = ["LayerCall", "Layout", "ModelAdapter", "Parts", "Recipe", "rotate", "rotate_interleaved"]
