"""Tokens of a Mamba-2 mixer between its projections in Triton: the launch.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width.
"""

from typing import Any

import torch
from torch import Tensor

from ..launch import WIDE, dense_rows, on_device, width
from .triton_mamba2 import mamba2


def fused(zxbcdt: Tensor, weights: Any, held: Any, at: Any) -> Tensor:
    """`mamba2_steps` in one launch; arguments as there."""
    (B, H, P, N), G, T = held.state.shape, held.x.shape[2], zxbcdt.shape[1]
    for name, buffer in held._asdict().items():
        assert buffer.is_contiguous(), f"the kernel writes {name} in place"
    zxbcdt, out = dense_rows(zxbcdt), torch.empty(B, T, H * P, dtype=zxbcdt.dtype, device=zxbcdt.device)
    with on_device(zxbcdt):
        mamba2[H, B](
            zxbcdt, weights.conv.contiguous(), weights.conv_bias, weights.dt_bias, weights.A_log, weights.D, weights.norm, *held, *at, out,
            *zxbcdt.stride()[:2], T, G, held.x.shape[1], held.raw.shape[1], weights.eps,
            P=P, N=N, R=H // G, W=weights.conv.shape[1], SILU=weights.silu,
            BP=width(P), BN=width(N), ACC=WIDE[held.state.dtype], num_warps=4,
        )  # fmt: skip
    return out
