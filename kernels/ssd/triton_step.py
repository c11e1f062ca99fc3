"""SSD in Triton: one token.

Shapes: B batch, H query heads, G key/value heads, R = H // G, P head width, N state width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import accumulator
from ..launch import dense_rows, on_device, sums_in, width

ROWS = 32  # of a head's state in one program: at batch 1 there are few heads to fill the device


@triton.jit
def advance(
    x, a, b, c, dt, D, state, y, new, stride_x, stride_b, stride_c, H, P: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BP rows of one head: the new state and their part of y [B, H, P]."""
    h, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, BN)
    value = tl.load(x + row * stride_x + (h // R) * P + p, mask=p < P, other=0.0).to(ACC)
    key = tl.load(b + row * stride_b + (h // R) * N + n, mask=n < N, other=0.0).to(ACC)
    query = tl.load(c + row * stride_c + h * N + n, mask=n < N, other=0.0).to(ACC)
    write = value
    if dt is not None:
        write = value * tl.load(dt + row * H + h).to(ACC)
    inside, tile = (p < P)[:, None] & (n < N)[None, :], (row * H + h) * P * N + p[:, None] * N + n[None, :]
    S = tl.load(state + tile, mask=inside, other=0.0).to(ACC) * tl.exp(tl.load(a + row * H + h).to(ACC))
    S += write[:, None] * key[None, :]
    tl.store(new + tile, S, mask=inside)
    out = tl.sum(S * query[None, :], 1)
    if D is not None:
        out += value * tl.load(D + h).to(ACC)
    tl.store(y + (row * H + h) * P + p, out, mask=p < P)


def fused_step(x: Tensor, a: Tensor, b: Tensor, c: Tensor, dt: Tensor | None, D: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """`ssd_step` in one launch; shapes as there."""
    (B, H, P, N), G = state.shape, x.shape[1]
    x, b, c = (dense_rows(t.flatten(1)) for t in (x, b, c))
    y, new = torch.empty(B, H, P, dtype=x.dtype, device=x.device), torch.empty(state.shape, dtype=accumulator(x.dtype), device=x.device)
    BP = min(ROWS, width(P))
    with on_device(x):
        advance[triton.cdiv(P, BP), H, B](
            x, a.contiguous(), b, c, None if dt is None else dt.contiguous(), D, state.contiguous(), y, new,
            x.stride(0), b.stride(0), c.stride(0), H, P=P, N=N, R=H // G, BP=BP, BN=width(N), ACC=sums_in(x), num_warps=4,
        )  # fmt: skip
    return y, new
