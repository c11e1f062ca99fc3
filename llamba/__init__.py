"""llamba: pretrained transformers into Mamba hybrids. Importing it teaches transformers' Auto classes to load them."""

from llamba import speculative
from llamba.models.convert import convert

__all__ = ["convert", "speculative"]
