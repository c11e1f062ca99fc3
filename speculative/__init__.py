"""Lossless speculative decoding: `generate` with a small model, or the text itself, as the draft."""

from llamba.speculative.drafts import Lookup
from llamba.speculative.generate import Generation, generate

__all__ = ["Generation", "Lookup", "generate"]
