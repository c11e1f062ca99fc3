"""Tokens of a Mamba-1 mixer between its projections in Triton: one program per block of channels and row, its states in registers.

Shapes: B batch, T time, C = H P channels, G P shared channels of x and b before the GQA repeat, X channels of the convolution, N state
width, W conv width, L slots of kept inputs, SLOTS of raw convolution inputs. A slot that is read in a launch is not written in it, and
exactly one program writes each: shared channels belong to the first channel that reads them.
"""

import triton
import triton.language as tl

from .triton_mamba2 import channels, softplus


@triton.jit(do_not_specialize=["T"])
def mamba1(
    zxbc, steps, conv, conv_bias, dt_bias, A_log, D, state, raw, ring_x, ring_b, ring_dt, length, folded, new, fold_to, out,
    stride_zb, stride_zt, stride_db, stride_dt, T, C, SHARED, X, L, SLOTS, BLOCK: tl.constexpr, SHARE: tl.constexpr, X_SHARE: tl.constexpr,
    N: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`mamba1_steps` for one block of channels of one row. The loop runs over the tokens behind the state, then over the new ones.

    SHARE channels read one shared channel, X_SHARE one of the convolution; they stand BLOCK apart.
    """
    row, channel, n = tl.program_id(1).to(tl.int64), tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, BN)
    real, inside = channel < C, (channel < C)[:, None] & (n < N)[None, :]
    x_at, x_first = channel // BLOCK // X_SHARE * BLOCK + channel % BLOCK, channel // BLOCK % X_SHARE == 0
    c_at = (channel // N * N)[:, None] + n[None, :]  # [BC, BN]: the channels of a group of N read the same b and c
    b_at, b_first = c_at // BLOCK // SHARE * BLOCK + c_at % BLOCK, (c_at // BLOCK % SHARE == 0) & (channel % N == 0)[:, None]
    tile = (row * C + channel[:, None]) * N + n[None, :]
    S = tl.load(state + tile, mask=inside, other=0.0)
    rate = tl.exp(tl.load(A_log + channel[:, None] * N + n[None, :], mask=inside, other=0.0).to(ACC))
    bias, skip = tl.load(dt_bias + channel, mask=real, other=0.0).to(ACC), tl.load(D + channel, mask=real, other=0.0).to(ACC)
    begin, start, until = tl.load(folded + row), tl.load(length + row), tl.load(fold_to + row)
    tokens, slots = zxbc + row * stride_zb, raw + row * SLOTS * X
    for pos in range(begin, start + tl.load(new + row)):
        is_new = pos >= start
        slot, token = row * L + pos % L, tokens + (pos - start) * stride_zt
        in_x, in_b, in_dt = ring_x + slot * X + x_at, ring_b + slot * SHARED + b_at, ring_dt + slot * C + channel
        if is_new:  # rounded as the rings round, so that a replay gives the same bits
            x = channels(tokens + C, slots, conv, conv_bias, pos, start, 0, x_at, X, x_first, stride_zt, X, SLOTS, W, SILU, ACC)
            x = x.to(ring_x.dtype.element_ty)
            b = tl.load(token + C + X + b_at, mask=inside, other=0.0).to(ring_b.dtype.element_ty)
            dt = tl.load(steps + row * stride_db + (pos - start) * stride_dt + channel, mask=real, other=0.0).to(ring_dt.dtype.element_ty)
            tl.store(in_x, x, mask=real & x_first)
            tl.store(in_b, b, mask=inside & b_first)
            tl.store(in_dt, dt, mask=real)
        else:
            x, dt = tl.load(in_x, mask=real, other=0.0), tl.load(in_dt, mask=real, other=0.0)
            b = tl.load(in_b, mask=inside, other=0.0)
        step, value = softplus(dt.to(ACC) + bias), x.to(ACC)
        S = S * tl.exp(-rate * step[:, None]) + (value * step)[:, None] * b.to(ACC)
        if is_new:
            c = tl.load(token + C + X + SHARED + c_at, mask=inside, other=0.0).to(ACC)
            z = tl.load(token + channel, mask=real, other=0.0).to(ACC)
            y = (tl.sum(S * c, 1) + skip * value) * (z / (1.0 + tl.exp(-z)))
            tl.store(out + (row * T + pos - start) * C + channel, y, mask=real)
        if pos + 1 == until:
            tl.store(state + tile, S, mask=inside)
    for t in range(tl.load(new + row), T):
        tl.store(out + (row * T + t) * C + channel, tl.zeros((BC,), ACC), mask=real)
