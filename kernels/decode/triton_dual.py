"""Tokens of a Mamba-2 mixer between its projections in Triton, all at once: one program per head and row, matrix products.

Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, N state width, W conv width, C channels,
L slots of kept inputs, SLOTS of raw convolution inputs. The T tokens read the state, the kept tokens behind it in tiles, and each
other; there is no chain of steps. Slots are read and written as in `triton_mamba2`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import WIDE, dense_rows, on_device, precision, width
from .triton_mamba2 import softplus

TILE = 16  # kept tokens that are taken together


@triton.jit
def convolved(
    fresh, raw, conv, conv_bias, windows, t, new, start, channel, i, size, keep, stride_t, C, SLOTS,
    W: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The convolution of tokens t < new over channels channel + i, i < size; where `keep`, their raw inputs go into their slots.

    fresh: the row's channels at position `start`; raw: the row's slots. Positions before 0 are zeros.
    """
    at, there, real = channel + i, (i < size)[None, :], t < new
    z = tl.zeros((t.shape[0], i.shape[0]), ACC)
    if conv_bias is not None:
        z += tl.load(conv_bias + at, mask=i < size, other=0.0).to(ACC)[None, :]
    for k in tl.static_range(W):
        place = t + k - (W - 1)
        if windows is not None:
            place = tl.load(windows + t * W + k, mask=real, other=0).to(tl.int32) - (W - 1)
        now, before = (place >= 0) & real, (place < 0) & (place + start >= 0) & real
        value = tl.load(fresh + place[:, None] * stride_t + at[None, :], mask=now[:, None] & there, other=0.0)
        old = tl.load(raw + ((place + start) % SLOTS)[:, None] * C + at[None, :], mask=before[:, None] & there, other=0.0)
        z += (value.to(ACC) + old.to(ACC)) * tl.load(conv + at * W + k, mask=i < size, other=0.0).to(ACC)[None, :]
    own = tl.load(fresh + t[:, None] * stride_t + at[None, :], mask=real[:, None] & there, other=0.0)
    tl.store(raw + ((start + t) % SLOTS)[:, None] * C + at[None, :], own, mask=(t < tl.where(keep, new, 0))[:, None] & there)
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def rates(dt, bias, rate, there, SCALED: tl.constexpr):
    """Log decay and write strength of tokens, both 0 for those that are not there."""
    step = softplus(dt + bias)
    strength = there.to(dt.dtype)
    if SCALED:
        strength = tl.where(there, step, 0.0)
    return tl.where(there, -rate * step, 0.0), strength


@triton.jit
def kept(ring_x, ring_b, ring_dt, row, begin, q, there, g, h, G, H, L, P: tl.constexpr, N: tl.constexpr, p, n, ACC: tl.constexpr):
    """x [Q, P], b [Q, N] and dt [Q] of the tokens at positions begin + q, 0 where they are not there."""
    slot = row * L + (begin + q) % L
    x = tl.load(ring_x + (slot * G + g)[:, None] * P + p[None, :], mask=there[:, None] & (p < P)[None, :], other=0.0)
    b = tl.load(ring_b + (slot * G + g)[:, None] * N + n[None, :], mask=there[:, None] & (n < N)[None, :], other=0.0)
    return x.to(ACC), b.to(ACC), tl.load(ring_dt + slot * H + h, mask=there, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["T"])
def mamba2_dual(
    zxbcdt, conv, conv_bias, dt_bias, A_log, D, norm, state, raw, ring_x, ring_b, ring_dt, length, folded, new, fold_to,
    ancestors, windows, out, stride_zb, stride_zt, T, G, L, SLOTS, eps,
    P: tl.constexpr, N: tl.constexpr, R: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, SCALED: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`mamba2_steps` for one head of one row, in the dual form. Exponents are at most 0."""
    h, row, H = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    g, first, C = h // R, h % R == 0, G * P + G * N + H * N
    t, j, p, n = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BP), tl.arange(0, BN)
    begin, start, count, until = tl.load(folded + row), tl.load(length + row), tl.load(new + row), tl.load(fold_to + row)
    real, past = t < count, start - begin
    bias, skip, rate = tl.load(dt_bias + h).to(ACC), tl.load(D + h).to(ACC), tl.full((), 1.0, ACC)
    if A_log is not None:
        rate = tl.exp(tl.load(A_log + h).to(ACC))
    tokens, own = zxbcdt + row * stride_zb, row * L + (start + t) % L
    fresh, slots = tokens + H * P, raw + row * SLOTS * C
    x = convolved(fresh, slots, conv, conv_bias, windows, t, count, start, g * P, p, P, first, stride_zt, C, SLOTS, W, SILU, ACC)
    b = convolved(fresh, slots, conv, conv_bias, windows, t, count, start, G * P + g * N, n, N, first, stride_zt, C, SLOTS, W, SILU, ACC)
    at_c = G * (P + N) + h * N
    c = convolved(fresh, slots, conv, conv_bias, windows, t, count, start, at_c, n, N, True, stride_zt, C, SLOTS, W, SILU, ACC)
    x, b = x.to(ring_x.dtype.element_ty), b.to(ring_b.dtype.element_ty)  # rounded as the rings round, so that a replay sees the same
    owned = (t < tl.where(first, count, 0))[:, None]
    tl.store(ring_x + (own * G + g)[:, None] * P + p[None, :], x, mask=owned & (p < P)[None, :])
    tl.store(ring_b + (own * G + g)[:, None] * N + n[None, :], b, mask=owned & (n < N)[None, :])
    dt = tl.load(tokens + t * stride_zt + H * P + C + h, mask=real, other=0.0).to(ring_dt.dtype.element_ty)
    tl.store(ring_dt + own * H + h, dt, mask=real)

    x, b = tl.where(real[:, None], x.to(ACC), 0.0), tl.where(real[:, None], b.to(ACC), 0.0)
    a, strength = rates(dt.to(ACC), bias, rate, real, SCALED)
    sees = t[:, None] >= t[None, :]
    if ancestors is not None:
        inside = (t < T)[:, None] & (t < T)[None, :]
        sees = tl.load(ancestors + t[:, None] * T + t[None, :], mask=inside, other=0) != 0
    total = tl.sum(tl.where(sees, a[None, :], 0.0), 1)  # [T] log decay from the tokens that are kept to token t
    weight = tl.where(sees, tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0)) * strength[None, :], 0.0)
    y = tl.dot(tl.dot(c, tl.trans(b), input_precision=PREC) * weight, x, input_precision=PREC) + skip * x
    gone = tl.full((), 0.0, ACC)  # log decay over the kept tokens read so far, from the newest on
    for tile in range(tl.cdiv(past, BK)):
        q = past - (tile + 1) * BK + j
        old_x, old_b, old_dt = kept(ring_x, ring_b, ring_dt, row, begin, q, q >= 0, g, h, G, H, L, P, N, p, n, ACC)
        old_a, old_strength = rates(old_dt, bias, rate, q >= 0, SCALED)
        since = tl.cumsum(old_a, 0, reverse=True) - old_a + gone  # [Q], exact for the newest
        share = tl.exp(tl.minimum(total[:, None] + since[None, :], 0.0)) * old_strength[None, :]
        y += tl.dot(tl.dot(c, tl.trans(old_b), input_precision=PREC) * share, old_x, input_precision=PREC)
        gone += tl.sum(old_a, 0)
    inside, tile_of = (p < P)[:, None] & (n < N)[None, :], (row * H + h) * P * N + p[:, None] * N + n[None, :]
    S = tl.load(state + tile_of, mask=inside, other=0.0)
    y += tl.exp(tl.minimum(total + gone, 0.0))[:, None] * tl.dot(c, tl.trans(S), input_precision=PREC)
    z = tl.load(tokens + t[:, None] * stride_zt + h * P + p[None, :], mask=real[:, None] & (p < P)[None, :], other=0.0).to(ACC)
    y = y * (z / (1.0 + tl.exp(-z)))
    if norm is not None:
        y = y / tl.sqrt(tl.sum(y * y, 1) / P + eps)[:, None] * tl.load(norm + h * P + p, mask=p < P, other=0.0).to(ACC)[None, :]
    y = tl.where(real[:, None], y, 0.0)
    tl.store(out + ((row * T + t) * H + h)[:, None] * P + p[None, :], y, mask=(t < T)[:, None] & (p < P)[None, :])

    if until > begin:
        a, strength = rates(dt.to(ACC), bias, rate, real & (start + t < until), SCALED)
        left = tl.exp(tl.minimum(tl.cumsum(a, 0, reverse=True) - a, 0.0))
        fold = tl.dot(tl.trans(x * (strength * left)[:, None]), b, input_precision=PREC)  # [P, N]
        gone = tl.sum(a, 0)
        for tile in range(tl.cdiv(past, BK)):
            q = past - (tile + 1) * BK + j
            there = (q >= 0) & (begin + q < until)
            old_x, old_b, old_dt = kept(ring_x, ring_b, ring_dt, row, begin, q, there, g, h, G, H, L, P, N, p, n, ACC)
            old_a, old_strength = rates(old_dt, bias, rate, there, SCALED)
            since = tl.cumsum(old_a, 0, reverse=True) - old_a + gone
            fold += tl.dot(tl.trans(old_x * (old_strength * tl.exp(tl.minimum(since, 0.0)))[:, None]), old_b, input_precision=PREC)
            gone += tl.sum(old_a, 0)
        tl.store(state + tile_of, S * tl.exp(tl.minimum(gone, 0.0)) + fold, mask=inside)


def fused_dual(zxbcdt: Tensor, weights: Any, held: Any, at: Any, branches: Any) -> Tensor:
    """`mamba2_steps` with form="dual" in one launch; arguments as there."""
    (B, H, P, N), G, T = held.state.shape, held.x.shape[2], zxbcdt.shape[1]
    for name, buffer in held._asdict().items():
        assert buffer.is_contiguous(), f"the kernel writes {name} in place"
    tree = (None, None) if branches is None else (branches.ancestors.contiguous().to(torch.int8), branches.windows.contiguous())
    zxbcdt, out = dense_rows(zxbcdt), torch.empty(B, T, H * P, dtype=zxbcdt.dtype, device=zxbcdt.device)
    with on_device(zxbcdt):
        mamba2_dual[H, B](
            zxbcdt, weights.conv.contiguous(), weights.conv_bias, weights.dt_bias, weights.A_log, weights.D, weights.norm, *held, *at,
            *tree, out, *zxbcdt.stride()[:2], T, G, held.x.shape[1], held.raw.shape[1], weights.eps,
            P=P, N=N, R=H // G, W=weights.conv.shape[1], SILU=weights.silu, SCALED=weights.A_log is not None,
            BT=width(T), BK=TILE, BP=width(P), BN=width(N), ACC=WIDE[held.state.dtype], PREC=precision(zxbcdt), num_warps=8,
        )  # fmt: skip
    return out
