"""The causal convolution in Triton: forward, gradient, and a few tokens behind a ring of raw inputs.

Shapes: B batch, T time, C channels, W conv width, R slots of the ring. Position -w is entry W - 1 - w of the state.
"""

import triton
import triton.language as tl


@triton.jit
def tap(x, state, docs, row, pos, c, here, stride_xb, stride_xt, T, C, W: tl.constexpr, ACC: tl.constexpr):
    """Inputs at positions pos [BT] of channels c [BC], from the state where negative, 0 where of another document than `here` [BT]."""
    in_x, in_state, channel = (pos >= 0) & (pos < T), (pos < 0) & (pos > -W), (c < C)[None, :]
    at = row * stride_xb + pos[:, None].to(tl.int64) * stride_xt + c[None, :]
    value = tl.load(x + at, mask=in_x[:, None] & channel, other=0.0).to(ACC)
    at = (row * (W - 1) + pos[:, None] + W - 1) * C + c[None, :]
    value += tl.load(state + at, mask=in_state[:, None] & channel, other=0.0).to(ACC)
    if docs is not None:
        value *= tl.where(document(docs, row, pos, T) == here, 1.0, 0.0).to(ACC)[:, None]
    return value


@triton.jit
def document(docs, row, pos, T):
    """Document numbers at positions pos [BT]; the state belongs to document 0."""
    return tl.load(docs + row * T + pos, mask=(pos >= 0) & (pos < T), other=0)


@triton.jit
def before_silu(x, weight, bias, state, docs, row, pos, c, here, stride_xb, stride_xt, T, C, W: tl.constexpr, ACC: tl.constexpr):
    """The convolution [BT, BC] at positions pos."""
    z = tl.zeros((pos.shape[0], c.shape[0]), ACC)
    if bias is not None:
        z += tl.load(bias + c, mask=c < C, other=0.0).to(ACC)[None, :]
    for k in tl.static_range(W):
        value = tap(x, state, docs, row, pos - (W - 1) + k, c, here, stride_xb, stride_xt, T, C, W, ACC)
        z += value * tl.load(weight + c * W + k, mask=c < C, other=0.0).to(ACC)[None, :]
    return z


@triton.jit
def convolve(
    x, weight, bias, state, docs, y, stride_xb, stride_xt, T, C,
    W: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile [BT, BC] of y [B, T, C]."""
    row = tl.program_id(2).to(tl.int64)
    pos, c = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
    here = pos
    if docs is not None:
        here = document(docs, row, pos, T)
    z = before_silu(x, weight, bias, state, docs, row, pos, c, here, stride_xb, stride_xt, T, C, W, ACC)
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    tl.store(y + (row * T + pos[:, None]) * C + c[None, :], z, mask=(pos < T)[:, None] & (c < C)[None, :])


@triton.jit
def convolve_back(
    x, weight, bias, state, docs, dy, dx, dstate, dweight, dbias, stride_xb, stride_xt, T, C,
    W: tl.constexpr, SILU: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """TILES tiles [BT, BC] of the gradients of the state and x, and their part of those of weight and bias.

    dy and dx [B, T, C], dstate [B, W - 1, C]; dweight [B, programs over time, W, C] and dbias [B, programs over time, C] to be summed.
    The convolution is computed again at each of the W outputs that an input reaches.
    """
    row, part = tl.program_id(2).to(tl.int64), tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    c, taps = tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, BW)
    channel = (c < C)[None, :]
    dw, db = tl.zeros((BW, BC), ACC), tl.zeros((BC,), ACC)
    for tile in range(TILES):
        pos = (tl.program_id(0) * TILES + tile) * BT + tl.arange(0, BT) - (W - 1)
        grad = tl.zeros((BT, BC), ACC)
        for s in tl.static_range(W):
            out = pos + s  # reads pos through tap W - 1 - s
            here = out
            if docs is not None:
                here = document(docs, row, out, T)
            dz = tl.load(dy + (row * T + out[:, None]) * C + c[None, :], mask=((out >= 0) & (out < T))[:, None] & channel, other=0.0).to(
                ACC
            )
            if SILU:
                z = before_silu(x, weight, bias, state, docs, row, out, c, here, stride_xb, stride_xt, T, C, W, ACC)
                sigmoid = 1.0 / (1.0 + tl.exp(-z))
                dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
            if s == 0:
                db += tl.sum(dz, 0)
                for k in tl.static_range(W):
                    value = tap(x, state, docs, row, out - (W - 1) + k, c, here, stride_xb, stride_xt, T, C, W, ACC)
                    dw += tl.where((taps == k)[:, None], tl.sum(dz * value, 0)[None, :], 0.0)
            reached = dz * tl.load(weight + c * W + (W - 1 - s), mask=c < C, other=0.0).to(ACC)[None, :]
            if docs is not None:
                reached *= tl.where(document(docs, row, pos, T) == here, 1.0, 0.0).to(ACC)[:, None]
            grad += reached
        tl.store(dx + (row * T + pos[:, None]) * C + c[None, :], grad, mask=((pos >= 0) & (pos < T))[:, None] & channel)
        at = (row * (W - 1) + pos[:, None] + W - 1) * C + c[None, :]
        tl.store(dstate + at, grad, mask=(pos < 0)[:, None] & channel)
    tl.store(dweight + (part * W + taps[:, None]) * C + c[None, :], dw, mask=(taps < W)[:, None] & channel)
    tl.store(dbias + part * C + c, db, mask=c < C)


@triton.jit(do_not_specialize=["T"])
def ring_update(
    x, weight, bias, ring, length, new, y, stride_xb, stride_xt, T, C, R,
    W: tl.constexpr, SILU: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Convolve the first new[b] of T tokens x [B, T, C] behind length[b] others and put them into their slots of ring [B, R, C].

    Position p stands in slot p mod R; R >= W - 1 + T, so that no slot is read and written. y beyond new[b] is 0.
    """
    row, c = tl.program_id(1).to(tl.int64), tl.program_id(0) * BC + tl.arange(0, BC)
    start = tl.load(length + row)
    end = start + tl.load(new + row)
    for step in range(T):
        now = start + step
        z = tl.zeros((BC,), ACC)
        if bias is not None:
            z += tl.load(bias + c, mask=c < C, other=0.0).to(ACC)
        for k in tl.static_range(W):
            pos = now - (W - 1) + k
            is_new, is_old = pos >= start, (pos < start) & (pos >= 0)  # as bounds of c: the interpreter has no scalar in a mask
            fresh = tl.load(x + row * stride_xb + (pos - start) * stride_xt + c, mask=c < tl.where(is_new, C, 0), other=0.0).to(ACC)
            old = tl.load(ring + (row * R + pos % R) * C + c, mask=c < tl.where(is_old, C, 0), other=0.0).to(ACC)
            z += (fresh + old) * tl.load(weight + c * W + k, mask=c < C, other=0.0).to(ACC)
        if SILU:
            z = z / (1.0 + tl.exp(-z))
        tl.store(y + (row * T + step) * C + c, tl.where(now < end, z, 0.0), mask=c < C)
        raw = tl.load(x + row * stride_xb + step * stride_xt + c, mask=c < C, other=0.0)
        tl.store(ring + (row * R + now % R) * C + c, raw, mask=c < tl.where(now < end, C, 0))
