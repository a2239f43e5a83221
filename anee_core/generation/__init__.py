"""From prompts to new tokens and text."""

from anee_core.generation.decode import decode
from anee_core.generation.options import DecodeOptions
from anee_core.generation.result import Generation
from anee_core.generation.text import generate_text

__all__ = ["DecodeOptions", "Generation", "decode", "generate_text"]
