"""Tokens of a Mamba-2 mixer between its projections in Triton: one program per head and row, its state in registers.

Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, N state width, W conv width, C channels,
L slots of kept inputs, SLOTS of raw convolution inputs. A slot that is read in a launch is not written in it, and exactly one
program writes each: the channels of x and b belong to the first head of their group.
"""

import triton
import triton.language as tl


@triton.jit
def softplus(v):
    """log(1 + e^v), accurate where e^v is small (Kahan's log1p)."""
    e = tl.exp(tl.minimum(v, 20.0))
    near = 1.0 + e
    return tl.where(v > 20.0, v, tl.where(near == 1.0, e, tl.log(near) * (e / tl.where(near == 1.0, 1.0, near - 1.0))))


@triton.jit
def channels(
    fresh, raw, conv, conv_bias, pos, start, channel, i, size, keep, stride_t, C, SLOTS,
    W: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The convolution at position pos of channels channel + i, i < size; where `keep`, the raw input goes into its slot.

    fresh: the row's channels at position `start`; raw: the row's slots. Positions before 0 are zeros.
    """
    at = channel + i
    z = tl.zeros(i.shape, ACC)
    if conv_bias is not None:
        z += tl.load(conv_bias + at, mask=i < size, other=0.0).to(ACC)
    for k in tl.static_range(W):
        p = pos - (W - 1) + k
        new = tl.load(fresh + (p - start) * stride_t + at, mask=i < tl.where(p >= start, size, 0), other=0.0)
        old = tl.load(raw + (p % SLOTS) * C + at, mask=i < tl.where((p < start) & (p >= 0), size, 0), other=0.0)
        z += (new.to(ACC) + old.to(ACC)) * tl.load(conv + at * W + k, mask=i < size, other=0.0).to(ACC)
    now = tl.load(fresh + (pos - start) * stride_t + at, mask=i < size, other=0.0)
    tl.store(raw + (pos % SLOTS) * C + at, now, mask=i < tl.where(keep, size, 0))
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def turned_channels(
    fresh, raw, conv, conv_bias, pos, start, channel, n, size, keep, cos, sin, stride_t, C, SLOTS,
    Q: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`channels` of a head, of which the first Q are turned: the first half's partners stand in the second, with a minus.

    cos, sin: the token's Q cosines and sines.
    """
    own = channels(fresh, raw, conv, conv_bias, pos, start, channel, n, size, keep, stride_t, C, SLOTS, W, SILU, ACC)
    if Q > 0:
        low = n < Q // 2
        partner = tl.where(low, n + Q // 2, tl.where(n < Q, n - Q // 2, n))
        other = channels(fresh, raw, conv, conv_bias, pos, start, channel, partner, size, False, stride_t, C, SLOTS, W, SILU, ACC)
        angle = tl.load(sin + n, mask=n < Q, other=0.0).to(ACC)
        own = own * tl.load(cos + n, mask=n < Q, other=1.0).to(ACC) + tl.where(low, -other, other) * angle
    return own


@triton.jit(do_not_specialize=["T"])
def mamba2(
    zxbcdt, conv, conv_bias, dt_bias, A_log, D, norm, state, raw, ring_x, ring_b, ring_dt, length, folded, new, fold_to, cos, sin, out,
    stride_zb, stride_zt, T, G, L, SLOTS, eps,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`mamba2_steps` for one head of one row. The loop runs over the tokens behind the state, then over the new ones, in one body."""
    h, row, H = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    g, first, C = h // R, h % R == 0, G * P + G * N + H * N
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    inside, tile = (p < P)[:, None] & (n < N)[None, :], (row * H + h) * P * N + p[:, None] * N + n[None, :]
    S = tl.load(state + tile, mask=inside, other=0.0)
    begin, start, until = tl.load(folded + row), tl.load(length + row), tl.load(fold_to + row)
    bias, skip = tl.load(dt_bias + h).to(ACC), tl.load(D + h).to(ACC)
    rate = tl.full((), 1.0, ACC)
    if A_log is not None:
        rate = tl.exp(tl.load(A_log + h).to(ACC))
    tokens = zxbcdt + row * stride_zb
    fresh, slots = tokens + H * P, raw + row * SLOTS * C
    for pos in range(begin, start + tl.load(new + row)):
        is_new = pos >= start
        slot = row * L + pos % L
        at_x, at_b, at_dt = ring_x + (slot * G + g) * P + p, ring_b + (slot * G + g) * N + n, ring_dt + slot * H + h
        if is_new:  # rounded as the rings round, so that a replay gives the same bits
            x = channels(fresh, slots, conv, conv_bias, pos, start, g * P, p, P, first, stride_zt, C, SLOTS, W, SILU, ACC)
            angle = (row * T + pos - start) * Q
            b = turned_channels(
                fresh, slots, conv, conv_bias, pos, start, G * P + g * N, n, N, first, cos + angle, sin + angle, stride_zt, C, SLOTS,
                Q, W, SILU, ACC,
            )  # fmt: skip
            x, b = x.to(ring_x.dtype.element_ty), b.to(ring_b.dtype.element_ty)
            dt = tl.load(tokens + (pos - start) * stride_zt + H * P + C + h).to(ring_dt.dtype.element_ty)
            tl.store(at_x, x, mask=p < tl.where(first, P, 0))
            tl.store(at_b, b, mask=n < tl.where(first, N, 0))
            tl.store(at_dt, dt)
        else:
            x, b, dt = tl.load(at_x, mask=p < P, other=0.0), tl.load(at_b, mask=n < N, other=0.0), tl.load(at_dt)
        step = softplus(dt.to(ACC) + bias)
        value = x.to(ACC)
        write = value
        if A_log is not None:
            write = value * step
        S = S * tl.exp(-rate * step) + write[:, None] * b.to(ACC)[None, :]
        if is_new:
            angle = (row * T + pos - start) * Q
            c = turned_channels(
                fresh, slots, conv, conv_bias, pos, start, G * (P + N) + h * N, n, N, True, cos + angle, sin + angle, stride_zt, C, SLOTS,
                Q, W, SILU, ACC,
            )  # fmt: skip
            y = tl.sum(S * c[None, :], 1) + skip * value
            z = tl.load(tokens + (pos - start) * stride_zt + h * P + p, mask=p < P, other=0.0).to(ACC)
            y = y * (z / (1.0 + tl.exp(-z)))
            if norm is not None:
                y = y / tl.sqrt(tl.sum(y * y, 0) / P + eps) * tl.load(norm + h * P + p, mask=p < P, other=0.0).to(ACC)
            tl.store(out + ((row * T + pos - start) * H + h) * P + p, y, mask=p < P)
        if pos + 1 == until:
            tl.store(state + tile, S, mask=inside)
    for t in range(tl.load(new + row), T):
        tl.store(out + ((row * T + t) * H + h) * P + p, tl.zeros((BP,), ACC), mask=p < P)
