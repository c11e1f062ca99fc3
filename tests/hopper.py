"""Compile the Triton kernels for an H100 or H200 where there is none, at Llama-3-8B's shapes; one JSON line per kernel.

Run as a script without TRITON_INTERPRET, with the dtypes to compile for (default bfloat16). ptxas and cuobjdump come with triton.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import llamba.kernels.block.triton_op as block
import llamba.kernels.conv1d.triton_op as conv1d
import llamba.kernels.decode.triton_dual as dual
import llamba.kernels.decode.triton_op as decode
import llamba.kernels.delta.triton_op as delta
import llamba.kernels.selective_scan.triton_op as selective_scan
import llamba.kernels.slots.triton_op as slots
import llamba.kernels.ssd.triton_op as ssd
import llamba.kernels.ssd.triton_step as step
from llamba.kernels.decode import Branches, Mamba1Weights, Weights, buffers, cursors, mamba1_buffers
from llamba.models.tree import grow

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64", torch.int8: "i8"}
OPTIONS = ("num_warps", "num_stages")
ALIGNED = [["tt.divisibility", 16]]
T, H, G, P, W = 4096, 32, 8, 128, 4
C = 2 * G * P + H * P


class Recorder:
    """Stands for a kernel and notes its launches instead of making them."""

    def __init__(self, kernel: Any, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **named: self.launches.append((self.kernel, args, named))


def _dual_launches(wide: torch.Tensor, weights: Weights, noted: list) -> None:
    """The dual form of a chain and of a tree."""
    kernel, dual.mamba2_dual = dual.mamba2_dual, Recorder(dual.mamba2_dual, noted)  # not the functions that it calls
    tree = grow((2, 2, 1, 1), torch.device("cpu"))
    for tokens, branches in ((5, None), (len(tree), Branches(tree.ancestors, tree.windows(W)))):
        held = buffers(1, H, G, P, P, W, tokens, wide.dtype, "cpu")
        dual.fused_dual(wide[:, :tokens], weights, held, cursors(1, "cpu"), branches)
    dual.mamba2_dual = kernel


def launches(dtype: torch.dtype) -> list:
    """Every launch of a training step's SSD, selective scan and convolution, of one token, and of rounds of decoding, on empty tensors."""
    noted: list = []
    for module in (ssd, step, delta, selective_scan, conv1d, decode, slots, block):
        for name, value in vars(module).copy().items():
            if isinstance(value, (triton.JITFunction, Recorder)):
                setattr(module, name, Recorder(value.kernel if isinstance(value, Recorder) else value, noted))
    wide = torch.empty(1, T, H * P + C + H, dtype=dtype)
    raw = wide[..., H * P : H * P + C].requires_grad_()
    conv, bias = torch.empty(C, W, requires_grad=True), torch.empty(C)
    y = conv1d.fused(raw, conv, bias, "silu", torch.empty(1, W - 1, C, dtype=dtype), None)
    torch.autograd.grad(y.sum(), conv)
    x, b, c = (t.unflatten(-1, (-1, P)) for t in raw.split([G * P, G * P, H * P], -1))
    a = torch.empty(1, T, H, requires_grad=True)
    y, last = ssd.fused(x, a, b, c, torch.empty(1, T, H), torch.empty(H), None, None, 64)
    torch.autograd.grad(y.sum() + last.sum(), a)
    _mamba1_scan(T, H * P // 16, 16, torch.zeros(1, T, dtype=torch.int32), dtype)
    _mamba1_scan(1, H, P, None, dtype)
    with torch.no_grad():
        step.fused_step(x[:, 0], a[:, 0], b[:, 0], c[:, 0], torch.empty(1, H), torch.empty(H), torch.empty(1, H, P, P))
    _delta_rule(x, b, c, dtype)
    weights = Weights(conv.detach(), bias, *torch.empty(3, H), torch.empty(H * P))
    decode.fused(wide[:, :5], weights, buffers(1, H, G, P, P, W, 5, dtype, "cpu"), cursors(1, "cpu"))
    if dtype == torch.bfloat16:
        _dual_launches(wide, weights, noted)
    parameters = torch.empty(G * P, W), torch.empty(G * P), torch.empty(H * P), torch.empty(H * P, 16), torch.empty(H * P)
    held = mamba1_buffers(1, H * P, G * P, G * P, 16, W, 5, dtype, "cpu")
    decode.fused_mamba1(wide[:, :5], wide[:, :5, : H * P], Mamba1Weights(*parameters, P), held, cursors(1, "cpu"))
    q, k, keys = (torch.empty(1, size, heads, P, dtype=dtype) for size, heads in ((5, H), (5, G), (2048, G)))
    positions, angles = torch.empty(1, 5, dtype=torch.long), torch.empty(2048, P, dtype=dtype)
    slots.fused_place(q, k, k, angles, angles, positions, keys, keys)
    slots.fused_attend(q, keys, keys, positions, P**-0.5, None)
    block.fused_norm(q.flatten(2), q.flatten(2), angles[0].repeat(H), 1e-5)
    block.fused_gate(q, q)
    return noted


def _delta_rule(x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, dtype: torch.dtype) -> None:
    """Two chunks of the delta rule and their gradient, and one token with either kind of decay."""
    (x, b, c), a = (t[:, :128].detach() for t in (x, b, c)), torch.zeros(1, 128, H, requires_grad=True)
    y, last = delta.fused(x, a, b, c, torch.empty(1, 128, H), None, None, None, 64)
    torch.autograd.grad(y.sum() + last.sum(), a)
    for rate in (a[:, 0], torch.empty(1, H, P)):
        with torch.no_grad():
            delta.fused_step(x[:, 0], rate, b[:, 0], c[:, 0], torch.empty(1, H), torch.empty(1, H), torch.empty(1, H, P, P))


def _mamba1_scan(T: int, S: int, N: int, docs: torch.Tensor | None, dtype: torch.dtype) -> None:
    """The selective scan of T tokens and its gradient, in S groups of b and c."""
    x, b = torch.empty(1, T, H * P, dtype=dtype), torch.empty(1, T, S, N, dtype=dtype)
    dt, A = torch.empty(1, T, H * P, requires_grad=True), torch.empty(H * P, N)
    y, last = selective_scan.fused(x, dt, A, b, b, A[:, 0].contiguous(), None, docs, 64)
    torch.autograd.grad(y.sum() + last.sum(), dt)


def compile_launch(kernel: Any, args: tuple, named: dict[str, Any]) -> dict[str, Any]:
    """What ptxas says about one launch."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in named.items() if k not in OPTIONS}
    fixed = {name for name, p in inspect.signature(kernel.fn).parameters.items() if p.annotation is tl.constexpr}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name], attributes[(place,)] = "*" + TYPES[value.dtype], ALIGNED
        elif name in fixed or value is None or (value == 1 and name not in kernel.do_not_specialize):
            signature[name], constants[(place,)] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(place,)] = ALIGNED
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={k: named[k] for k in OPTIONS if k in named})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    counts = {"registers": int(registers), "stack": int(stack), "shared": made.metadata.shared}
    return {"kernel": kernel.fn.__name__, **counts, "wgmma": "wgmma.mma_async" in made.asm["ptx"]}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or ["bfloat16"]:
        for launch in launches(getattr(torch, name)):
            print(json.dumps(compile_launch(*launch) | {"dtype": name}), flush=True)
