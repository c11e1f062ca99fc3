"""Does it run at all: every Triton kernel, forward and backward, against PyTorch in fp64, and one captured graph; one row each.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, W conv width, C channels. On a CPU the kernels are
interpreted (TRITON_INTERPRET=1), in fp32 alone and smaller.
"""

import argparse
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llamba.base.devices import meant
from llamba.base.provenance import append_row
from llamba.kernels.block import add_norm, gated
from llamba.kernels.conv1d import causal_conv1d
from llamba.kernels.decode import Weights, buffers, commit, cursors, mamba2_steps, plan
from llamba.kernels.selective_scan import selective_scan
from llamba.kernels.slots import attend
from llamba.kernels.ssd import ssd, ssd_step

Made = dict[str, Tensor]
BUDGET = {torch.float32: 1e-3, torch.bfloat16: 1e-2}  # relative RMS error; products of fp32 may be tf32's


def _randn(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str) -> Made:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}


def _ssd_inputs(B: int, T: int, H: int, G: int, P: int, dtype: torch.dtype, device: str) -> Made:
    inputs = _randn({"x": (B, T, G, P), "b": (B, T, G, P), "c": (B, T, H, P)}, dtype, device)
    wide = _randn({"a": (B, T, H), "dt": (B, T, H), "D": (H,), "state": (B, H, P, P)}, torch.float32, device)
    return inputs | wide | {"a": -wide["a"].abs(), "dt": wide["dt"].abs()}


def _scan_inputs(B: int, T: int, C: int, N: int, dtype: torch.dtype, device: str) -> Made:
    inputs = _randn({"x": (B, T, C), "b": (B, T, C // N, N), "c": (B, T, C // N, N)}, dtype, device)
    wide = _randn({"dt": (B, T, C), "A": (C, N), "D": (C,), "state": (B, C, N)}, torch.float32, device)
    return inputs | wide | {"dt": wide["dt"].square(), "A": -wide["A"].exp()}


def _conv_inputs(B: int, T: int, C: int, dtype: torch.dtype, device: str) -> Made:
    return _randn({"x": (B, T, C), "state": (B, 3, C)}, dtype, device) | _randn({"weight": (C, 4), "bias": (C,)}, torch.float32, device)


def _outputs(call: Callable[..., Any], inputs: Made, gradients: bool) -> Made:
    """A call's outputs and, of their sum with fixed weights, the gradient of every input."""
    leaves = {name: value.detach().clone().requires_grad_(gradients) for name, value in inputs.items()}
    out = call(**leaves)
    outs = out if isinstance(out, tuple) else (out,)
    made = {f"output {place}": value.detach() for place, value in enumerate(outs)}
    if gradients:
        loss = sum((value.double() * torch.linspace(-1, 1, value.numel(), device=value.device).view(value.shape)).sum() for value in outs)
        made |= dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return made


def _errors(call: Callable[..., Any], inputs: Made, gradients: bool) -> dict[str, float]:
    """Relative RMS error of each output and gradient in Triton, against PyTorch in fp64."""
    got = _outputs(partial(call, impl="triton"), inputs, gradients)
    want = _outputs(partial(call, impl="torch"), {name: value.double() for name, value in inputs.items()}, gradients)
    return {
        name: ((got[name].double() - exact).square().mean() / exact.square().mean().clamp_min(1e-30)).sqrt().item()
        for name, exact in want.items()
    }


def _decode_errors(dtype: torch.dtype, device: str, size: dict[str, int]) -> dict[str, float]:
    """A round of decoding, in Triton and in PyTorch with the same numbers."""
    H, G, P, T, W = size["H"], size["G"], size["P"], 5, 4
    C = 2 * G * P + H * P
    wide = _randn({"conv": (C, W), "bias": (C,), "norm": (H * P,)}, torch.float32, device)
    one, two, three = torch.ones(3, H, device=device)
    weights = Weights(wide["conv"], wide["bias"], one, two, three, wide["norm"])
    tokens = _randn({"z": (1, T, H * P + C + H)}, dtype, device)["z"]
    made = {}
    for impl in ("triton", "torch"):
        held, at = buffers(1, H, G, P, P, W, T, dtype, device), cursors(1, device)
        new = torch.tensor([T], device=device)
        plan(at, new, T, held.x.shape[1], True)
        made[impl] = mamba2_steps(tokens, weights, held, at, impl=impl).double()
        commit(at, new)
    return {"y": ((made["triton"] - made["torch"]).square().mean() / made["torch"].square().mean()).sqrt().item()}


def _attend_errors(dtype: torch.dtype, device: str, size: dict[str, int]) -> dict[str, float]:
    H, G, P = size["H"], size["G"], size["P"]
    inputs = _randn({"q": (1, 5, H, P), "keys": (1, 64, G, P), "values": (1, 64, G, P)}, dtype, device)
    positions = torch.arange(5, device=device)[None] + 30
    call = lambda q, keys, values, impl: attend(q, keys, values, positions, P**-0.5, None, impl=impl)  # noqa: E731
    return _errors(call, inputs, gradients=False)


def _captured(device: str) -> dict[str, float]:
    """A graph of one SSD step that is captured and replayed; the error of what the replay writes."""
    inputs = {name: value[:, 0] if value.ndim > 3 or name in ("a", "dt") else value for name, value in
              _ssd_inputs(1, 1, 8, 2, 128, torch.float32, device).items() if name != "state"}  # fmt: skip
    state = torch.zeros(1, 8, 128, 128, device=device)
    x, a, b, c, dt, D = (inputs[name] for name in ("x", "a", "b", "c", "dt", "D"))
    run = partial(ssd_step, x, a, b, c, dt=dt, D=D, state=state)
    with torch.no_grad():
        want = run()[0].clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()[0]
        graph.replay()
        torch.cuda.synchronize()
    return {"y": ((out - want).square().mean() / want.square().mean()).sqrt().item()}


def cases(dtype: torch.dtype, device: str) -> dict[str, Callable[[], dict[str, float]]]:
    """What is checked, by name: a call that gives relative errors."""
    small = device == "cpu"
    B, T, H, G, P = (1, 20, 2, 1, 16) if small else (2, 257, 8, 2, 128)
    size = {"H": H, "G": G, "P": P}
    C, N = (32, 16) if small else (256, 16)
    made: dict[str, Callable[[], dict[str, float]]] = {
        "ssd": partial(_errors, ssd, _ssd_inputs(B, T, H, G, P, dtype, device), True),
        "selective_scan": partial(_errors, selective_scan, _scan_inputs(B, T, C, N, dtype, device), True),
        "conv1d": partial(_errors, partial(causal_conv1d, activation="silu"), _conv_inputs(B, T, C, dtype, device), True),
        "decode": partial(_decode_errors, dtype, device, size),
        "attention to slots": partial(_attend_errors, dtype, device, size),
        "sum and norm": partial(
            _errors, partial(add_norm, eps=1e-5), _randn({"x": (1, 5, C), "residual": (1, 5, C), "weight": (C,)}, dtype, device), False
        ),
        "gate": partial(_errors, gated, _randn({"gate": (1, 5, C), "up": (1, 5, C)}, dtype, device), False),
    }
    return made if small else made | {"graph": partial(_captured, device)}


def check(name: str, case: Callable[[], dict[str, float]], budget: float) -> dict[str, Any]:
    """One row: the worst error, or the whole of what was raised. Whatever a kernel raises is a result here, not an end."""
    started = time.perf_counter()
    row: dict[str, Any] = {"bench": "smoke", "case": name, "error": None}
    try:
        found = case()
        worst = max(found, key=lambda key: found[key] if found[key] == found[key] else float("inf"))
        row |= {"worst": worst, "relative": found[worst], "passed": found[worst] <= budget}
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, KeyError, IndexError, OSError):
        row |= {"passed": False, "error": traceback.format_exc()}
    return row | {"seconds": round(time.perf_counter() - started, 2)}


def main(args: argparse.Namespace) -> None:
    """Print the table; with `--out`, append the rows. Exits with 1 where a case failed."""
    device = meant(args.device)
    failed = 0
    for dtype, budget in BUDGET.items():
        if device == "cpu" and dtype != torch.float32:
            continue  # the interpreter multiplies bit patterns of bf16
        for name, case in cases(dtype, device).items():
            row = check(name, case, budget) | {"dtype": str(dtype).removeprefix("torch."), "device": device}
            failed += not row["passed"]
            said = row["error"].strip().splitlines()[-1] if row["error"] else f"{row['worst']} off by {row['relative']:.1e}"
            print(f"{name:<20}{row['dtype']:<10}{'ok' if row['passed'] else 'FAILED':<8}{row['seconds']:6.1f} s   {said}", flush=True)
            if args.out:
                append_row(args.out, row)
    if failed:
        raise SystemExit(1)
