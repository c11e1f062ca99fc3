"""Several tokens a launch against one token a launch: Figure 3 of "The Mamba in the Llama" (arXiv 2408.15237).

For each step size K: the time that the decode kernel of one mixer takes for 32 tokens in 32 / K launches of K tokens, against 32
launches of one. On CUDA the launches are replayed from a graph, so that launch gaps do not count twice. Shapes: those of Llama-3-8B,
divided by `--shrink`. H query heads, G key/value heads, P head width, N state width (P; 16 for Mamba-1), W convolution width.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llamba.base.devices import meant
from llamba.base.provenance import append_row
from llamba.bench.timing import median_seconds
from llamba.kernels.decode import (
    Buffers,
    Mamba1Weights,
    Weights,
    buffers,
    commit,
    cursors,
    mamba1_buffers,
    mamba1_steps,
    mamba2_steps,
    plan,
)

TOKENS = 32
STEPS = (1, 2, 4, 8, 16, 32)
H, G, P, W, NARROW = 32, 8, 128, 4, 16
DTYPES = {"auto": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


Tokens = tuple[Tensor, ...]  # the arguments before the weights: [B, T, ...]
Kernel = Callable[..., Tensor]


def _mamba2(step: int, heads: int, groups: int, width: int, dtype: torch.dtype, device: str) -> tuple[Kernel, Any, Buffers, list[Tokens]]:
    """The kernel, its weights and buffers, and the tokens of each launch."""
    channels = 2 * groups * width + heads * width
    conv, bias = torch.randn(channels, W, dtype=dtype, device=device), torch.zeros(channels, dtype=dtype, device=device)
    dt_bias, A_log, D = torch.zeros(3, heads, device=device).unbind()
    weights = Weights(conv, bias, dt_bias, A_log, D, torch.ones(heads * width, device=device))
    tokens = torch.randn(TOKENS // step, 1, step, heads * width + channels + heads, dtype=dtype, device=device)
    return mamba2_steps, weights, buffers(1, heads, groups, width, width, W, step, dtype, device), [(block,) for block in tokens]


def _mamba1(step: int, heads: int, groups: int, width: int, dtype: torch.dtype, device: str) -> tuple[Kernel, Any, Buffers, list[Tokens]]:
    """As `_mamba2`."""
    channels, shared = heads * width, groups * width
    conv, bias = torch.randn(shared, W, dtype=dtype, device=device), torch.zeros(shared, dtype=dtype, device=device)
    dt_bias, D = torch.zeros(2, channels, device=device).unbind()
    weights = Mamba1Weights(conv, bias, dt_bias, torch.zeros(channels, NARROW, device=device), D, width)
    rows, steps = (torch.randn(TOKENS // step, 1, step, n, dtype=dtype, device=device) for n in (2 * channels + 2 * shared, channels))
    held = mamba1_buffers(1, channels, shared, shared, NARROW, W, step, dtype, device)
    return mamba1_steps, weights, held, list(zip(rows, steps, strict=True))


MIXERS = {"mamba2": _mamba2, "mamba1": _mamba1}


def _launches(mixer: str, step: int, shrink: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """A call that emits 32 tokens, `step` at a time, every one of them kept."""
    heads, groups, width = max(H // shrink, 1), max(G // shrink, 1), max(P // shrink, 16)
    kernel, weights, held, launches = MIXERS[mixer](step, heads, groups, width, dtype, device)
    at, new = cursors(1, device), torch.full((1,), step, dtype=torch.int32, device=device)

    def run() -> None:
        for tokens in launches:
            plan(at, new, step, held.x.shape[1], keep=True)
            kernel(*tokens, weights, held, at)
            commit(at, new)

    return run


def _graphed(run: Callable[[], None]) -> Callable[[], None]:
    """The launches of `run` as one CUDA graph."""
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(mixer: str, shrink: int, dtype: torch.dtype, device: str, repeats: int) -> list[dict[str, Any]]:
    """One row per step size: milliseconds for 32 tokens, and how many times as fast as one token a launch."""
    rows: list[dict[str, Any]] = []
    for step in STEPS:
        run = _launches(mixer, step, shrink, dtype, device)
        spent = 1e3 * median_seconds(_graphed(run) if device.startswith("cuda") else run, device, repeats)
        first = rows[0]["ms"] if rows else spent
        rows.append({"bench": "multistep", "mixer": mixer, "step": step, "tokens": TOKENS, "ms": spent, "speedup": first / spent})
    return rows


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """The rows as a picture: multi-step against single-step, as in the paper."""
    from matplotlib.figure import Figure  # half a second, and only for pictures

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    several = rows[1:]
    axes.plot([row["step"] for row in several], [row["ms"] for row in several], marker="o", label="K tokens a launch")
    axes.axhline(rows[0]["ms"], linestyle="--", label="one token a launch")
    axes.set(xscale="log", xlabel="K", ylabel=f"ms for {TOKENS} tokens", ylim=(0, None))
    axes.set_xticks([row["step"] for row in several], [str(row["step"]) for row in several])
    axes.legend()
    figure.savefig(path, dpi=150)


def main(args: argparse.Namespace) -> None:
    """Print the table; with `--out`, append the rows to a .jsonl file with what made them; with `--picture`, draw it."""
    device = meant(args.device)
    torch.manual_seed(0)
    rows = measure(args.mixer, args.shrink, DTYPES[args.dtype], device, args.repeats)
    for row in rows:
        print(f"{row['step']:3d} tokens a launch   {row['ms']:9.3f} ms for {TOKENS}   x{row['speedup']:.2f}", flush=True)
        if args.out:
            append_row(args.out, row | {"device": device, "shrink": args.shrink, "dtype": args.dtype})
    if args.picture:
        draw(rows, args.picture)
