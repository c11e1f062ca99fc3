"""A training step of a mixer's recurrence, forward and backward: Triton against PyTorch and, where they are installed, mamba-ssm and
flash-linear-attention, beside what the device can do at most.

Shapes: those of a Llama-3-8B mixer, B = 1, T = 4,096, H = 32, G = 8, P = N = 128 (Mamba-1: N = 16, H P / N groups), with H, G and T divided
by `--shrink`. The two ceilings are measured on the spot: a copy (bytes read and written) and a bf16 matrix product.
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llamba.base.devices import meant
from llamba.base.provenance import append_row
from llamba.bench.timing import median_seconds
from llamba.kernels.selective_scan import selective_scan
from llamba.kernels.ssd import ssd

T, H, G, P, NARROW = 4096, 32, 8, 128, 16
SCANS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"mamba2": ssd, "mamba1": selective_scan}
FORMS = {"cpu": ("torch",), "cuda": ("torch", "mamba_ssm", "fla", "triton")}
PEERS = ("torch", "mamba_ssm")  # what the later forms are compared with
DTYPES = {"auto": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def ceilings(device: str, shrink: int, repeats: int) -> dict[str, float]:
    """GB/s of a copy and TFLOP/s of a bf16 matrix product."""
    numbers, side = (1 << 30) // shrink, 8192 // shrink
    source, target = torch.empty(2, numbers, dtype=torch.uint8, device=device).unbind()
    left, right = torch.randn(2, side, side, device=device).bfloat16().unbind()
    copied = median_seconds(lambda: target.copy_(source), device, repeats)
    multiplied = median_seconds(lambda: left @ right, device, repeats)
    return {"copy_gb_s": 2 * numbers / copied / 1e9, "matmul_tflop_s": 2 * side**3 / multiplied / 1e12}


def _inputs(mixer: str, shrink: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    tokens, heads, groups = max(T // shrink, 64), max(H // shrink, 1), max(G // shrink, 1)
    shapes: dict[str, tuple[int, ...]]
    if mixer == "mamba1":
        channels = heads * P
        shapes = {"x": (1, tokens, channels), **dict.fromkeys("bc", (1, tokens, channels // NARROW, NARROW))}
        wide = {"dt": torch.rand(1, tokens, channels, device=device), "A": -torch.rand(channels, NARROW, device=device)}
    else:
        channels = heads
        shapes = {"c": (1, tokens, heads, P), **dict.fromkeys("xb", (1, tokens, groups, P))}
        wide = {"dt": torch.rand(1, tokens, heads, device=device), "a": -torch.rand(heads, device=device)}
    made = {name: torch.randn(*shape, device=device).to(dtype) for name, shape in shapes.items()}
    return {name: tensor.requires_grad_() for name, tensor in (made | wide | {"D": torch.randn(channels, device=device)}).items()}


def _step(mixer: str, inputs: dict[str, Any], impl: str) -> Callable[[], None]:
    dy = torch.randn_like(inputs["x" if mixer == "mamba1" else "c"])  # of y: [B, T, C], or [B, T, H, P] with P = N

    def run() -> None:
        y, _ = SCANS[mixer](**inputs, impl=impl)
        torch.autograd.grad(y, list(inputs.values()), dy)

    return run


def measure(mixer: str, impl: str, shrink: int, dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """One row: milliseconds and, on CUDA, peak MiB beyond the inputs."""
    run = _step(mixer, _inputs(mixer, shrink, dtype, device), impl)
    row: dict[str, Any] = {"bench": "train", "mixer": mixer, "impl": impl, "ms": median_seconds(run, device, repeats) * 1e3}
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def compared(row: dict[str, Any], peers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times as fast as each peer a form is, and its peak memory as a part of the peer's."""
    made = {f"speed_of_{name}": peer["ms"] / row["ms"] for name, peer in peers.items()}
    return made | {f"memory_of_{name}": row["peak_mib"] / peer["peak_mib"] for name, peer in peers.items() if "peak_mib" in row}


def _line(impl: str, row: dict[str, Any], ratios: dict[str, float]) -> str:
    memory = f"   peak {row['peak_mib']:.0f} MiB" if "peak_mib" in row else ""
    return f"{impl:<10} {row['ms']:9.3f} ms{memory}" + "".join(
        f"   {name.replace('_', ' ', 2)} {value:.2f}" for name, value in ratios.items()
    )


def show_ceilings(limits: dict[str, float]) -> None:
    """Print what `ceilings` found."""
    print(f"copy {limits['copy_gb_s']:.3g} GB/s   bf16 matrix product {limits['matmul_tflop_s']:.3g} TFLOP/s", flush=True)


def main(args: argparse.Namespace) -> None:
    """Print the table; with `--out`, append the rows to a .jsonl file with what made them."""
    device = meant(args.device)
    torch.manual_seed(0)
    limits = ceilings(device, args.shrink, args.repeats)
    peers: dict[str, dict[str, Any]] = {}
    show_ceilings(limits)
    for impl in FORMS[torch.device(device).type]:
        if (args.mixer, impl) == ("mamba1", "fla"):
            continue  # has no selective scan
        if impl not in ("torch", "triton") and importlib.util.find_spec(impl) is None:
            print(f"{impl:<10} not installed")
            continue
        row = measure(args.mixer, impl, args.shrink, DTYPES[args.dtype], device, args.repeats)
        ratios = compared(row, peers)
        if impl in PEERS:
            peers[impl] = row
        print(_line(impl, row, ratios), flush=True)
        if args.out:
            append_row(args.out, row | ratios | {"device": device, "shrink": args.shrink, "dtype": args.dtype, **limits})
