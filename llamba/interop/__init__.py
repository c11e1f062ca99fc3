"""Other people's formats, in and out: stock architectures, GGUF, published hybrids, self-contained folders."""
