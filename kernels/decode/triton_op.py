"""Tokens of a mixer between its projections in Triton: the launches.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ..launch import WIDE, dense_rows, on_device, width
from .triton_mamba1 import mamba1
from .triton_mamba2 import mamba2

BLOCK = 32  # channels of a program of Mamba-1: at batch 1 there are few to fill the device


def fused(zxbcdt: Tensor, weights: Any, held: Any, at: Any, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`mamba2_steps` in one launch; arguments as there."""
    (B, H, P, N), G, T = held.state.shape, held.x.shape[2], zxbcdt.shape[1]
    _check_in_place(held)
    zxbcdt, out = dense_rows(zxbcdt), torch.empty(B, T, H * P, dtype=zxbcdt.dtype, device=zxbcdt.device)
    cos, sin = (out, out) if angles is None else (part.contiguous() for part in angles)  # of a width Q of 0 nothing is read
    with on_device(zxbcdt):
        mamba2[H, B](
            zxbcdt, weights.conv.contiguous(), weights.conv_bias, weights.dt_bias, weights.A_log, weights.D, weights.norm, *held, *at,
            cos, sin, out, *zxbcdt.stride()[:2], T, G, held.x.shape[1], held.raw.shape[1], weights.eps,
            P=P, N=N, Q=0 if angles is None else cos.shape[-1], R=H // G, W=weights.conv.shape[1], SILU=weights.silu,
            BP=width(P), BN=width(N), ACC=WIDE[held.state.dtype], num_warps=2 if P <= 64 else 4,
        )  # fmt: skip
    return out


def fused_mamba1(zxbc: Tensor, dt: Tensor, weights: Any, held: Any, at: Any) -> Tensor:
    """`mamba1_steps` in one launch; arguments as there."""
    (B, C, N), (_, L, shared), (_, R, X), T = held.state.shape, held.b.shape, held.raw.shape, zxbc.shape[1]
    _check_in_place(held)
    zxbc, dt, out = dense_rows(zxbc), dense_rows(dt), torch.empty(B, T, C, dtype=zxbc.dtype, device=zxbc.device)
    with on_device(zxbc):
        mamba1[triton.cdiv(C, BLOCK), B](
            zxbc, dt, weights.conv.contiguous(), weights.conv_bias, weights.dt_bias, weights.A_log.contiguous(), weights.D, *held, *at, out,
            *zxbc.stride()[:2], *dt.stride()[:2], T, C, shared, X, L, R,
            BLOCK=weights.block, SHARE=C // shared, X_SHARE=C // X, N=N, W=weights.conv.shape[1], SILU=weights.silu,
            BC=BLOCK, BN=width(N, 1), ACC=WIDE[held.state.dtype], num_warps=4,
        )  # fmt: skip
    return out


def _check_in_place(held: Any) -> None:
    for name, buffer in held._asdict().items():
        assert buffer.is_contiguous(), f"the kernel writes {name} in place"
