"""Lossless speculative decoding: `generate` with a small model, or the text itself, as the draft."""

from llamba.speculative.generate import Generation, generate
from llamba.speculative.lookahead import Auto
from llamba.speculative.proposers import Lookup

__all__ = ["Auto", "Generation", "Lookup", "generate"]
