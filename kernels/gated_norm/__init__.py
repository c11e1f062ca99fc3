"""Gate, then RMSNorm over each head: w * n(y * SiLU(z)), the output norm of Mamba-2 with one group per head (Bamba, transformers).

Shapes: H heads, P head width; leading dimensions are free.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import accumulator, no_autocast


def gated_head_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y [..., H, P], z [..., H P], weight [H P] -> [..., H P] in at least fp32. Only its inputs are kept for the gradient.

    Raises ValueError where z or weight does not have H P entries.
    """
    width = y.shape[-2] * y.shape[-1]
    if z.shape[-1] != width or weight.shape != (width,):
        raise ValueError(f"z [..., {width}] and weight [{width}] are needed for heads {tuple(y.shape[-2:])}; got {tuple(z.shape)} and "
                         f"{tuple(weight.shape)}")  # fmt: skip
    if not torch.is_grad_enabled():
        return _normed(y, z, eps)[1].flatten(-2).mul_(weight)
    with no_autocast(y):
        return _GatedHeadNorm.apply(y, z, weight, eps)


def _normed(y: Tensor, z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU'd gate, normalised product and its scale: [..., H, P] twice and [..., H, 1]."""
    wide = accumulator(y.dtype)
    gate = torch.nn.functional.silu(z.to(wide)).view(y.shape)
    normed = y.to(wide) * gate
    scale = torch.linalg.vector_norm(normed, dim=-1, keepdim=True).square_().div_(y.shape[-1]).add_(eps).rsqrt_()
    return gate, normed.mul_(scale), scale


class _GatedHeadNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.eps = eps
        return _normed(y, z, eps)[1].flatten(-2).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y, z, weight = ctx.saved_tensors
        gate, normed, scale = _normed(y, z, ctx.eps)
        dout = dout.to(normed.dtype)
        dweight = (dout * normed.flatten(-2)).flatten(0, -2).sum(0)
        dnormed = (dout * weight).view(y.shape)
        along = (dnormed * normed).mean(-1, keepdim=True)
        dgated = dnormed.addcmul_(normed, along, value=-1).mul_(scale)
        dgate = (dgated * y).flatten(-2)
        dz = torch.ops.aten.silu_backward(dgate, z.to(normed.dtype))
        return dgated.mul_(gate).to(y.dtype), dz.to(z.dtype), dweight.to(weight.dtype), None
