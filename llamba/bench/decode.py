"""Decoding in CUDA graphs at batch 1: against Hugging Face's `generate` on the same model, and against what the memory allows.

Shapes: Llama-3-8B with attention in half of its layers and Mamba-2 in the others, random weights in bf16; divided by `--shrink`. A token
reads every weight but the embedding's (one row of it): the bandwidth of a copy, measured on the spot, over those bytes is the ceiling.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from llamba.base.devices import meant
from llamba.base.provenance import append_row
from llamba.bench.shapes import build
from llamba.bench.timing import median_seconds
from llamba.bench.train import DTYPES, ceilings
from llamba.models.convert import student_config
from llamba.models.published import teacher_config
from llamba.speculative import generate
from llamba.speculative.graphs import Decoder
from llamba.speculative.sampling import Sampler

PROMPT, DRAFTED = 128, 4  # tokens before those that are timed; drafted tokens of a round that is verified


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that one token reads: all of them, but of an embedding that is not the head as well one row."""
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    total = sum(weight.nbytes for weight in model.parameters())
    return total if tied else total - embedding.nbytes + embedding[0].nbytes


def graphed(model: Any, prompt: list[int], tokens: int, repeats: int) -> float:
    """Tokens per second of the decoder, the fastest of `repeats` passes behind one that captures."""
    ids = torch.tensor([prompt], device=model.device)
    passes = [generate(model, ids, max_new_tokens=tokens, eos_token_id=None, engine="graphs") for _ in range(repeats + 1)]
    return max(made.tokens_per_second for made in passes[1:])


def hugging_face(model: Any, prompt: list[int], tokens: int, repeats: int) -> float:
    """Tokens per second of transformers' eager greedy loop, without the reading of the prompt; the fastest of `repeats` passes each."""
    ids = torch.tensor([prompt], device=model.device)

    def seconds(new: int) -> float:
        started = time.perf_counter()
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, -1].item()
        return time.perf_counter() - started

    seconds(2)
    all_of_it, reading = (min(seconds(new) for _ in range(repeats)) for new in (tokens + 1, 1))
    return tokens / max(all_of_it - reading, 1e-9)


def round_call(model: Any, prompt: list[int], drafted: int, calls: int) -> Callable[[], None]:
    """What reads the model's last token and `drafted` ones behind it, and keeps what stands; with room for `calls` calls."""
    tokens = calls * (drafted + 1)
    made = Decoder(model, None, 1, len(prompt) + tokens + drafted, drafted, Sampler(), 8)
    made.start(model, None, [prompt], tokens, set())
    return made.round(drafted)[-1]


@torch.inference_mode()
def round_seconds(model: Any, prompt: list[int], drafted: int, repeats: int) -> float:
    """Median seconds of a `round_call`."""
    return median_seconds(round_call(model, prompt, drafted, repeats + 2), model.device.type, repeats)


def measure(shrink: int, dtype: torch.dtype, device: str, tokens: int, repeats: int) -> dict[str, Any]:
    """One row: tokens per second of both, the bytes of a token and their ceiling, and what verifying costs."""
    model = build(student_config(teacher_config("meta-llama-3-8b"), "mamba2", 0.5), shrink, dtype, device)
    prompt = torch.randint(3, model.config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    limits, read = ceilings(device, shrink, repeats), weight_bytes(model)
    ours, theirs = graphed(model, prompt, tokens, repeats), hugging_face(model, prompt, tokens, repeats)
    one, several = (round_seconds(model, prompt, drafted, 4 * repeats) for drafted in (0, DRAFTED))
    return {
        "bench": "decode", "shape": "llama-3-8b, 50% mamba2", "tokens": tokens, "tokens_per_second": ours, "hugging_face": theirs,
        "speedup": ours / theirs, "weight_bytes": read, **limits, "ceiling": limits["copy_gb_s"] * 1e9 / read,
        "share_of_ceiling": ours * read / limits["copy_gb_s"] / 1e9, "step_ms": one * 1e3, "verify_ms": several * 1e3,
        "verify_over_step": several / one,
    }  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Print the numbers; with `--out`, append the row to a .jsonl file with what made it."""
    device = meant(args.device)
    row = measure(args.shrink, DTYPES[args.dtype], device, args.tokens, args.repeats)
    print(f"copy {row['copy_gb_s']:.0f} GB/s   bf16 matrix product {row['matmul_tflop_s']:.1f} TFLOP/s")
    print(f"a token reads {row['weight_bytes'] / 1e9:.2f} GB of weights: at most {row['ceiling']:.1f} tokens/s")
    print(f"graphs        {row['tokens_per_second']:8.1f} tokens/s   {row['share_of_ceiling']:.0%} of that")
    print(f"Hugging Face  {row['hugging_face']:8.1f} tokens/s   graphs x{row['speedup']:.2f}")
    print(f"a step of 1 token {row['step_ms']:.3f} ms, of {DRAFTED + 1} tokens {row['verify_ms']:.3f} ms   x{row['verify_over_step']:.2f}")
    if args.out:
        append_row(args.out, row | {"device": device, "shrink": args.shrink, "dtype": args.dtype})
