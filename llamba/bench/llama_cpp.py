"""`llamba bench llama-cpp`: how fast llama.cpp runs GGUF files behind texts of several lengths, in turns."""

import argparse
import statistics
from pathlib import Path

import torch

from llamba.base.provenance import append_row, version
from llamba.interop.gguf import asked


def main(args: argparse.Namespace) -> None:
    """Print, and perhaps append to a file, a row per file and length: tokens per second of the text and behind it."""
    contexts = [int(length) for length in args.contexts.split(",")]
    generator = torch.Generator().manual_seed(0)
    for context in contexts:
        prompt = torch.randint(300, 900, (context,), generator=generator).tolist()  # ordinary pieces in any vocabulary
        seconds: dict[str, list[tuple[float, float]]] = {file: [] for file in args.files}
        for _ in range(args.repeats):
            for file in args.files:  # in turns, so that a busy minute of the machine meets all of them
                found = asked(Path(file), [prompt], args.tokens, args.threads, exact=False, probabilities=0)
                seconds[file].append(tuple(found["seconds"][0]))
        for file, measured in seconds.items():
            text, new = (statistics.median(times) for times in zip(*measured, strict=True))
            row = {
                "engine": f"llama.cpp (xllamacpp {version('xllamacpp')})", "file": Path(file).name, "bytes": Path(file).stat().st_size,
                "context": context, "threads": args.threads, "repeats": args.repeats, "prompt_tokens_per_second": context / text,
                "new_tokens_per_second": args.tokens / new,
            }  # fmt: skip
            print(f"{row['file']:<32} {context:>6} tokens: reads {context / text:8.1f}/s, writes {args.tokens / new:7.1f}/s", flush=True)
            if args.out:
                append_row(args.out, row)
