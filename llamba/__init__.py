"""llamba: pretrained transformers into Mamba hybrids. Importing it teaches transformers' Auto classes to load them."""

from llamba import families as families
