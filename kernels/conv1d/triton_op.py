"""The causal convolution in Triton: the launches.

Shapes: B batch, T time, C channels, W conv width.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import accumulator
from ..launch import dense_rows, on_device, sums_in, width
from .triton_kernels import convolve, convolve_back, ring_update

TILES = 16  # tiles of time of a program of the gradient: its sums over time go to memory once


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor, docs: Tensor | None) -> Tensor:
    """`causal_conv1d` where every token is real; shapes as there, y [B, T, C] alone."""
    docs = None if docs is None else docs.to(torch.int32).contiguous()
    with on_device(x):
        return _Fused.apply(dense_rows(x), weight.contiguous(), bias, state.contiguous(), docs, activation == "silu")


def fused_ring(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, ring: Tensor, length: Tensor, new: Tensor) -> Tensor:
    """`causal_conv1d_ring` in one launch; shapes as there."""
    (B, T, C), W, BC = x.shape, weight.shape[1], min(256, width(x.shape[2]))
    x, y = dense_rows(x), torch.empty(B, T, C, dtype=x.dtype, device=x.device)
    with on_device(x):
        ring_update[triton.cdiv(C, BC), B](
            x, weight.contiguous(), bias, ring, length, new, y, *x.stride()[:2], T, C, ring.shape[1],
            W=W, SILU=activation == "silu", BC=BC, ACC=sums_in(x), num_warps=4,
        )  # fmt: skip
    return y


def _options(x: Tensor, weight: Tensor, silu: bool, widest: int) -> dict[str, Any]:
    return {"W": weight.shape[1], "SILU": silu, "BT": 16, "BC": min(widest, width(x.shape[2])), "ACC": sums_in(x), "num_warps": 4}


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, docs: Tensor | None, silu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias, state, docs)
        ctx.silu, options = silu, _options(x, weight, silu, 128)
        (B, T, C), y = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grid = triton.cdiv(T, options["BT"]), triton.cdiv(C, options["BC"]), B
        convolve[grid](x, weight, bias, state, docs, y, *x.stride()[:2], T, C, **options)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and state; those of weight and bias are summed over parts of the time axis."""
        x, weight, bias, state, docs = ctx.saved_tensors
        (B, T, C), W, options = x.shape, weight.shape[1], _options(x, weight, ctx.silu, 64)
        tiles = min(TILES, triton.cdiv(T + W - 1, options["BT"]))
        parts = triton.cdiv(T + W - 1, options["BT"] * tiles)
        dx, dstate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, state))
        dweight, dbias = (torch.empty(B * parts, *shape, dtype=accumulator(x.dtype), device=x.device) for shape in ((W, C), (C,)))
        convolve_back[parts, triton.cdiv(C, options["BC"]), B](
            x, weight, bias, state, docs, dy.contiguous(), dx, dstate, dweight, dbias, *x.stride()[:2], T, C,
            TILES=tiles, BW=triton.next_power_of_2(W), **options | {"num_warps": 4 if x.element_size() == 2 else 8},
        )  # fmt: skip
        dw, db = dweight.sum(0).t().to(weight.dtype), None if bias is None else dbias.sum(0).to(bias.dtype)
        return dx, dw, db, dstate, None, None
