"""Attention of a few new tokens to a cache of slots in Triton: the launches.

Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, S slots.
"""

import torch
from torch import Tensor

from ..launch import on_device, precision, width
from .triton_kernels import joined, part, place_heads

BLOCKS = {2: 64, 4: 32, 8: 32}  # slots that a program reads at a time, by bytes of a number: more would spill registers
PROGRAMS = 256  # to keep the largest devices busy


def fused_place(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:  # fmt: skip
    """`place` in one launch; arguments as there."""
    (B, T, H, P), (S, G) = q.shape, keys.shape[1:3]
    assert keys.is_contiguous() and values.is_contiguous(), "the kernel writes them in place"
    q, k, v, positions = q.contiguous(), k.contiguous(), v.contiguous(), positions.contiguous()
    out = torch.empty_like(q)
    with on_device(q):
        place_heads[B * T, G](q, k, v, cos, sin, positions, keys, values, out, T, G, S, P=P, R=H // G, BP=width(P), num_warps=2)
    return out


def splits(B: int, G: int, S: int, block: int) -> int:
    """Programs among which the slots of a row and group are split: a power of 2, and no more than there are blocks."""
    most = max(min(PROGRAMS // (B * G), S // block), 1)
    return 1 << (most.bit_length() - 1)


def fused_attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float, window: int | None) -> Tensor:
    """`attend` in two launches, of parts and of their sum; arguments as there."""
    (B, T, H, P), (S, G) = q.shape, keys.shape[1:3]
    assert keys.is_contiguous() and values.is_contiguous(), "the kernel reads them as they lie"
    q, positions, block, rows = q.contiguous(), positions.contiguous(), BLOCKS[q.element_size()], H // G * T
    parts = splits(B, G, S, block)
    sums = torch.empty(B * G, parts, rows, P, dtype=torch.float32, device=q.device)
    peaks, weights = torch.empty(2, B * G, parts, rows, dtype=torch.float32, device=q.device).unbind()
    y = torch.empty_like(q)
    with on_device(q):
        part[B * G, parts](
            q, keys, values, positions, sums, peaks, weights, T, G, S, scale, 0 if window is None else window,
            P=P, R=H // G, ROWS=width(rows), BP=width(P), BLOCK=block, PRECISION=precision(q),
            num_warps=4 if q.element_size() == 2 else 8,
        )  # fmt: skip
        joined[B * G, rows](sums, peaks, weights, y, T, G, P=P, R=H // G, PARTS=parts, BP=width(P), num_warps=1)
    return y
