"""Compile the Triton kernels for an H100 or H200 where there is none, at the shapes of published teachers; one JSON line per variant.

    python tests/hopper.py [--dtypes bfloat16 float32] [--kernels NAME ...] [--write]
    python tests/hopper.py --summary

`--write` makes the table that the tests hold, `tests/hopper.json`; `--summary` prints its short form, which stands in docs/gpu.md. Runs
without TRITON_INTERPRET; ptxas and cuobjdump come with triton.
Mamba-3 is the SSD with a group for every head; that variant is compiled in bf16 alone.
"""

import argparse
import inspect
import json
import re
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
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
import llamba.kernels.window.triton_op as window
from llamba.kernels.decode import Branches, Mamba1Weights, Weights, buffers, cursors, mamba1_buffers
from llamba.kernels.window import Held, Rest, Sight
from llamba.models.mixers import BEST
from llamba.models.published import teacher_config
from llamba.models.tree import grow

TABLE = Path(__file__).with_name("hopper.json")
SHAPES = ("meta-llama-3-8b", "smollm2-135m", "qwen3-4b")
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64", torch.int8: "i8"}
OPTIONS = ("num_warps", "num_stages")
ALIGNED = [["tt.divisibility", 16]]
T, W, SLOTS, ROUND, LONG = 4096, 4, 2048, 5, 20  # tokens of training, conv width, slots of a cache, tokens of a round and of a long one

noted: list = []


class Recorder:
    """Stands for a kernel and notes its launches instead of making them."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **named: noted.append((self.kernel, args, named))


class Shape(NamedTuple):
    """Query heads, key/value heads, head width, model width and MLP width of a teacher."""

    H: int
    G: int
    P: int
    D: int
    M: int

    @property
    def C(self) -> int:
        """Channels of a Mamba-2 mixer's convolution."""
        return 2 * self.G * self.P + self.H * self.P


def shape_of(name: str) -> Shape:
    c = teacher_config(name).to_dict()
    H, D = c["num_attention_heads"], c["hidden_size"]
    return Shape(H, c["num_key_value_heads"], c.get("head_dim") or D // H, D, c["intermediate_size"])


def record() -> None:
    """Put recorders where the launches find their kernels; not where kernels find the functions that they call."""
    for module in (ssd, step, delta, selective_scan, conv1d, decode, slots, block, window):
        for name, value in vars(module).copy().items():
            if isinstance(value, triton.JITFunction):
                setattr(module, name, Recorder(value))
    dual.mamba2_dual = Recorder(dual.mamba2_dual)


def launches(name: str, dtype: torch.dtype) -> list:
    """Every launch of training steps, of one token, and of rounds of decoding, on empty tensors of a teacher's shape."""
    noted.clear()
    shape = shape_of(name)
    _training(shape, dtype)
    _one_token(shape, dtype)
    _mamba2_rounds(shape, dtype)
    _mamba1_round(shape, dtype)
    _beside(shape, dtype)
    return list(noted)


def _heads(shape: Shape, tokens: int, dtype: torch.dtype, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, b and c as they lie in the convolution's output."""
    raw = torch.empty(1, tokens, (2 * groups + shape.H) * shape.P, dtype=dtype, requires_grad=True)
    x, b, c = (t.unflatten(-1, (-1, shape.P)) for t in raw.split([groups * shape.P, groups * shape.P, shape.H * shape.P], -1))
    return x, b, c


def _training(shape: Shape, dtype: torch.dtype) -> None:
    """Convolution, SSD, delta rule and selective scan of a sequence, forward and backward."""
    (H, G, P, _, _), C = shape, shape.C
    raw, conv = torch.empty(1, T, C, dtype=dtype, requires_grad=True), torch.empty(C, W, requires_grad=True)
    y = conv1d.fused(raw, conv, torch.empty(C), "silu", torch.empty(1, W - 1, C, dtype=dtype), None)
    torch.autograd.grad(y.sum(), conv)
    for groups in (G, H) if dtype == torch.bfloat16 else (G,):
        (x, b, c), a = _heads(shape, T, dtype, groups), torch.empty(1, T, H, requires_grad=True)
        y, last = ssd.fused(x, a, b, c, torch.empty(1, T, H), torch.empty(H), None, None, 64)
        torch.autograd.grad(y.sum() + last.sum(), a)
    x, b, c = (t.detach() for t in _heads(shape, 128, dtype, G))
    a = torch.zeros(1, 128, H, requires_grad=True)
    y, last = delta.fused(x, a, b, c, torch.empty(1, 128, H), None, None, None, 64)
    torch.autograd.grad(y.sum() + last.sum(), a)
    _scan(H * P, T, H * P // 16, 16, torch.zeros(1, T, dtype=torch.int32), dtype)
    _scan(H * P, 1, H, P, None, dtype)


def _scan(C: int, tokens: int, S: int, N: int, docs: Tensor | None, dtype: torch.dtype) -> None:
    """The selective scan of C channels and its gradient, in S groups of b and c."""
    x, b = torch.empty(1, tokens, C, dtype=dtype), torch.empty(1, tokens, S, N, dtype=dtype)
    dt, A = torch.empty(1, tokens, C, requires_grad=True), torch.empty(C, N)
    y, last = selective_scan.fused(x, dt, A, b, b, A[:, 0].contiguous(), None, docs, 64)
    torch.autograd.grad(y.sum() + last.sum(), dt)


@torch.no_grad()
def _one_token(shape: Shape, dtype: torch.dtype) -> None:
    """SSD, and the delta rule with either kind of decay."""
    H, _, P, _, _ = shape
    (x, b, c), a, state = (t[:, 0] for t in _heads(shape, 1, dtype, shape.G)), torch.empty(1, H), torch.empty(1, H, P, P)
    step.fused_step(x, a, b, c, torch.empty(1, H), torch.empty(H), state)
    for rate in (a, torch.empty(1, H, P)):
        delta.fused_step(x, rate, b, c, torch.empty(1, H), torch.empty(1, H), state)


@torch.no_grad()
def _mamba2_rounds(shape: Shape, dtype: torch.dtype) -> None:
    """Rounds of a Mamba-2 mixer: heads turned or not, the window, the dual form of short and long chains and of a tree; and the ring."""
    (H, G, P, _, _), C = shape, shape.C
    wide, angles = torch.empty(1, LONG, H * P + C + H, dtype=dtype), torch.empty(2, 1, ROUND, P, dtype=dtype).unbind()
    weights = Weights(torch.empty(C, W), torch.empty(C), *torch.empty(3, H), torch.empty(H * P))
    for turns in (None, angles):
        decode.fused(wide[:, :ROUND], weights, buffers(1, H, G, P, P, W, ROUND, dtype, "cpu"), cursors(1, "cpu"), turns)
    tree = grow((2, 2, 1, 1), torch.device("cpu"))
    for tokens, branches in ((ROUND, None), (LONG, None), (len(tree), Branches(tree.ancestors, tree.windows(W)))):
        dual.fused_dual(wide[:, :tokens], weights, buffers(1, H, G, P, P, W, tokens, dtype, "cpu"), cursors(1, "cpu"), branches)
    sight = Sight(BEST[1]["window"], BEST[1]["sinks"])
    keys = torch.empty(1, G, sight.sinks + sight.window + 2 * ROUND, P, dtype=dtype)
    held = Held(keys, keys, torch.empty(1, G, P), torch.empty(1, G, dtype=torch.long))
    rest = Rest(*torch.empty(2, H).unbind(), torch.empty(H * P, dtype=dtype))
    for tokens in (1, ROUND):
        heads = torch.empty(1, tokens, 2 * G + H, P, dtype=dtype)
        scores, y = torch.empty(1, tokens, H, dtype=dtype), torch.empty(1, tokens, H * P, dtype=dtype)
        window.fused_steps(heads, scores, y, rest, *(part[:, :tokens] for part in angles), held, cursors(1, "cpu"), sight, P**-0.5)
    ring, at = torch.empty(1, 8, C, dtype=dtype), cursors(1, "cpu")
    conv1d.fused_ring(wide[:, :ROUND, :C], weights.conv, weights.conv_bias, "silu", ring, at.length, at.new)


@torch.no_grad()
def _mamba1_round(shape: Shape, dtype: torch.dtype) -> None:
    H, G, P, _, _ = shape
    parameters = torch.empty(G * P, W), torch.empty(G * P), torch.empty(H * P), torch.empty(H * P, 16), torch.empty(H * P)
    held = mamba1_buffers(1, H * P, G * P, G * P, 16, W, ROUND, dtype, "cpu")
    wide = torch.empty(1, ROUND, H * P + 2 * G * P + H * P, dtype=dtype)
    decode.fused_mamba1(wide, wide[..., : H * P], Mamba1Weights(*parameters, P), held, cursors(1, "cpu"))


@torch.no_grad()
def _beside(shape: Shape, dtype: torch.dtype) -> None:
    """Attention to slots of one token and of a round, norms and gates."""
    H, G, P, D, M = shape
    keys, angles = torch.empty(1, SLOTS, G, P, dtype=dtype), torch.empty(SLOTS, P, dtype=dtype)
    for tokens in (1, ROUND):
        q, k = (torch.empty(1, tokens, heads, P, dtype=dtype) for heads in (H, G))
        positions = torch.empty(1, tokens, dtype=torch.long)
        slots.fused_place(q, k, k, angles, angles, positions, keys, keys)
        slots.fused_attend(q, keys, keys, positions, P**-0.5, None)
    hidden, up = torch.empty(1, ROUND, D, dtype=dtype), torch.empty(1, ROUND, M, dtype=dtype)
    block.fused_norm(hidden, None, torch.empty(D, dtype=dtype), 1e-5)
    block.fused_norm(hidden, hidden, torch.empty(D, dtype=dtype), 1e-5)
    block.fused_gate(up, up)


class Variant(NamedTuple):
    """A launch as the compiler sees it; `about`: its constants, and which of its tensors are absent."""

    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]
    about: str


def variant(kernel: Any, args: tuple, named: dict[str, Any]) -> Variant:
    """What a launch is compiled for, as Triton specialises it: numbers that are 1 are constants, multiples of 16 are known to be."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in named.items() if k not in OPTIONS}
    fixed = {name for name, p in inspect.signature(kernel.fn).parameters.items() if p.annotation is tl.constexpr}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, Tensor):
            signature[name], attributes[(place,)] = "*" + TYPES[value.dtype], ALIGNED
        elif name in fixed or value is None or (value == 1 and name not in kernel.do_not_specialize):
            signature[name], constants[(place,)] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and name not in kernel.do_not_specialize:
                attributes[(place,)] = ALIGNED
    options = {name: named[name] for name in OPTIONS if name in named}
    told = {name: values[name] for name in kernel.arg_names if name in fixed} | options
    absent = [f"-{name}" for name in kernel.arg_names if values[name] is None]
    return Variant(signature, constants, attributes, options, " ".join([*(f"{key}={value}" for key, value in told.items()), *absent]))


def compiled(kernel: Any, made: Variant) -> dict[str, Any]:
    """What ptxas says: registers and spilled bytes (the stack) of a thread, bytes of shared memory of a program."""
    source = ASTSource(kernel, signature=made.signature, constexprs=made.constants, attrs=made.attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=made.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    counts = {"registers": int(registers), "stack": int(stack), "shared": built.metadata.shared}
    return counts | {"wgmma": "wgmma.mma_async" in built.asm["ptx"]}


def table(dtypes: list[str], kernels: list[str] | None) -> list[dict[str, Any]]:
    """A row for each kernel and variant; teachers that share a variant share its row."""
    rows: dict[str, dict[str, Any]] = {}
    for dtype in dtypes:
        for shape in SHAPES:
            for kernel, args, named in launches(shape, getattr(torch, dtype)):
                name = kernel.fn.__name__
                if kernels and name not in kernels:
                    continue
                made = variant(kernel, args, named)
                key = repr((name, dtype, made))
                if key not in rows:
                    rows[key] = {"kernel": name, "dtype": dtype, "shapes": [], "about": made.about, **compiled(kernel, made)}
                if shape not in rows[key]["shapes"]:
                    rows[key]["shapes"].append(shape)
    return list(rows.values())


def summary(rows: list[dict[str, Any]]) -> str:
    """A line per kernel, in Markdown: the most of each number over shapes and variants, bf16 / fp32."""
    lines = ["| kernel | variants | registers | spilled bytes | shared memory, KiB |", "|---|---|---|---|---|"]
    for name in sorted({row["kernel"] for row in rows}):
        own = {dtype: [row for row in rows if (row["kernel"], row["dtype"]) == (name, dtype)] for dtype in ("bfloat16", "float32")}
        most = {key: [max(row[key] for row in found) for found in own.values()] for key in ("registers", "stack", "shared")}
        shared = " / ".join(f"{value / 1024:.0f}" for value in most["shared"])
        cells = (" / ".join(map(str, cell)) for cell in (map(len, own.values()), most["registers"], most["stack"]))
        lines.append(f"| `{name}` | {' | '.join(cells)} | {shared} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--kernels", nargs="+")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        return print(summary(json.loads(TABLE.read_text())["rows"]))
    warnings.simplefilter("ignore")
    record()
    lines = [json.dumps(row) for row in table(args.dtypes, args.kernels)]
    print("\n".join(lines))
    if args.write:
        head = f'"triton": {json.dumps(triton.__version__)}, "rows": [\n'
        TABLE.write_text("{" + head + ",\n".join(lines) + "\n]}\n")


if __name__ == "__main__":
    main()
