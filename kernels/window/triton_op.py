"""A round of new tokens over keys and values in slots in Triton: the launch.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, S slots.
"""

from typing import Any

import torch
from torch import Tensor

from ..launch import dense_rows, on_device, precision, width
from .sight import NO_LIMIT, Sight
from .triton_kernels import window_round

BLOCK = 32  # slots that a program reads at a time


def fused_steps(
    heads: Tensor, mass: Tensor, y: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Any, sight: Sight, scale: float
) -> Tensor:
    """`window_steps` in one launch; arguments as there."""
    (B, T, E, P), (_, G, S, _) = heads.shape, keys.shape
    assert keys.is_contiguous() and values.is_contiguous(), "the kernel writes them in place"
    rows, H = dense_rows(heads.flatten(2)), E - 2 * G
    mass, y, cos, sin, out = dense_rows(mass), y.contiguous(), cos.contiguous(), sin.contiguous(), torch.empty_like(y)
    with on_device(heads):
        window_round[G, B](
            rows, mass, y, cos, sin, keys, values, at.length, at.new, out, *rows.stride()[:2], *mass.stride()[:2], T, G, scale,
            sight.window, NO_LIMIT if sight.reach is None else sight.reach, sight.whole,
            M=sight.sinks, S=S, P=P, Q=cos.shape[-1], R=H // G, ROWS=width(H // G * T), BT=width(T), BP=width(P), BLOCK=BLOCK,
            PRECISION=precision(heads), num_warps=4 if P <= 64 else 8, num_stages=1,
        )  # fmt: skip
    return out
