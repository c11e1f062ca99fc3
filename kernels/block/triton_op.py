"""Residual sum with RMSNorm, and an MLP's gate, in Triton: one program per token, or per block of numbers.

Shapes: B batch, T time, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device, width

NUMBERS = 1024  # of a program of the gate


@triton.jit
def norm_rows(x, residual, weight, total, y, D, eps, BD: tl.constexpr):
    """One token: the sum, rounded as it is kept, and its RMSNorm in fp32."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    at = row * D + i
    s = tl.load(x + at, mask=i < D, other=0.0)
    if residual is not None:
        s = (s.to(tl.float32) + tl.load(residual + at, mask=i < D, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, s, mask=i < D)
    wide = s.to(tl.float32)
    made = wide / tl.sqrt(tl.sum(wide * wide, 0) / D + eps)
    made = made.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, made * tl.load(weight + i, mask=i < D, other=0.0).to(tl.float32), mask=i < D)


@triton.jit
def gate_numbers(gate, up, y, count, BLOCK: tl.constexpr):
    """SiLU(gate) * up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g, u = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32), tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    g = (g / (1.0 + tl.exp(-g))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, g * u, mask=at < count)


def fused_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_norm` in one launch; arguments as there."""
    x, D = x.contiguous(), x.shape[-1]
    total, y = x if residual is None else torch.empty_like(x), torch.empty_like(x)
    with on_device(x):
        other = None if residual is None else residual.contiguous()
        norm_rows[x.numel() // D,](x, other, weight, total, y, D, eps, BD=width(D), num_warps=8)
    return total, y


def fused_gate(gate: Tensor, up: Tensor) -> Tensor:
    """`gated` in one launch; arguments as there."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    with on_device(gate):
        gate_numbers[triton.cdiv(y.numel(), NUMBERS),](gate, up, y, y.numel(), BLOCK=NUMBERS, num_warps=4)
    return y
