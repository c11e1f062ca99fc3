"""A round of new tokens over keys and values in slots in Triton: the launch.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, S slots.
"""

from typing import Any

import torch
from torch import Tensor

from ..launch import dense_rows, on_device, precision, width
from .sight import NO_LIMIT, Held, Rest, Sight
from .triton_kernels import window_round

BLOCK = 32  # slots that a program reads at a time


def fused_steps(
    heads: Tensor, scores: Tensor, y: Tensor, rest: Rest, cos: Tensor, sin: Tensor, held: Held, at: Any, sight: Sight, scale: float
) -> Tensor:
    """`window_steps` in one launch; arguments as there."""
    (B, T, E, P), (_, G, S, _) = heads.shape, held.keys.shape
    assert all(part.is_contiguous() for part in held), "the kernel writes them in place"
    rows, H = dense_rows(heads.flatten(2)), E - 2 * G
    scores, y, cos, sin, out = dense_rows(scores), y.contiguous(), cos.contiguous(), sin.contiguous(), torch.empty_like(y)
    with on_device(heads):
        window_round[G, B](
            rows, scores, y, *rest, cos, sin, *held, at.length, at.new, out, *rows.stride()[:2], *scores.stride()[:2], T, G, scale,
            sight.window, NO_LIMIT if sight.reach is None else sight.reach, sight.whole,
            M=sight.sinks, S=S, P=P, Q=cos.shape[-1], R=H // G, ROWS=width(H // G * T), BT=width(T + 1), BP=width(P), BLOCK=BLOCK,
            PRECISION=precision(heads), num_warps=4 if P <= 64 else 8, num_stages=1,
        )  # fmt: skip
    return out
