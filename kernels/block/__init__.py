"""What stands around a mixer when a few tokens are decoded: residual sum with RMSNorm, and the gate of an MLP, one launch each.

At batch 1 a step reads weights; every further launch costs microseconds in which nothing is read. No gradients.
Shapes: B batch, T time, D model width, E width of the MLP.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..choice import choose
from ..common import check_shape

__all__ = ["add_norm", "gated"]


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """The sum s = residual + x [B, T, D] and s / sqrt(mean(s^2) + eps) * weight [D]: as Llama, the norm in fp32.

    residual None: s is x. Raises `ValueError` for shapes that do not fit, and for an `impl` that is unknown or cannot run here.
    """
    check_shape("residual", residual, *x.shape)
    check_shape("weight", weight, x.shape[-1])
    if choose("add_norm", impl, ("torch", "triton"), x) == "triton":
        from .triton_op import fused_norm

        return fused_norm(x, residual, weight, eps)
    total = x if residual is None else residual + x
    wide = total.to(torch.float32)
    return total, weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def gated(gate: Tensor, up: Tensor, impl: str = "auto") -> Tensor:
    """SiLU(gate) * up [B, T, E]. Raises `ValueError` as `add_norm`."""
    check_shape("up", up, *gate.shape)
    if choose("gated", impl, ("torch", "triton"), gate) == "triton":
        from .triton_op import fused_gate

        return fused_gate(gate, up)
    return silu(gate) * up
