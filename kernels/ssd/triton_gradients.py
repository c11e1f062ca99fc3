"""SSD in Triton: the gradients of one chunk.

Two kernels, so that each holds one wide sum in registers: one per query head for c, the decays, dt and D; one per key/value head,
over its query heads, that gives the gradient of x or, with the parts of values and keys exchanged, that of b.
Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, N state width, K chunks of Q tokens.
"""

import triton
import triton.language as tl

from .triton_outputs import within


@triton.jit
def head_gradients(
    x, b, c, whole, rest, dt, states, dstates, across, dy, dc, da, ddt, dD,
    stride_xb, stride_xt, stride_xh, stride_bb, stride_bt, stride_bh, stride_cb, stride_ct, stride_ch, stride_db, stride_dt, stride_dh,
    T, H, P: tl.constexpr, N: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dc [B, T, H, N], da and ddt [B, T, H], dD [B, K, H] (to be summed) of one chunk and head, from dy [B, T, H, P].

    The gradient of a decay is the sum of the flows that pass it. Nothing that was added is subtracted again, so a decay that lets
    nothing pass gets no rounding noise. across [B, H, K] is the flow from the state before the chunk to the one after it.
    """
    h, k, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    K = tl.num_programs(1)
    t, p, n = k * Q + tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    long, p_in, n_in = t[:, None].to(tl.int64), (t < T)[:, None] & (p < P)[None, :], (t < T)[:, None] & (n < N)[None, :]
    queries = tl.load(c + row * stride_cb + h * stride_ch + long * stride_ct + n[None, :], mask=n_in, other=0.0)
    keys = tl.load(b + row * stride_bb + (h // R) * stride_bh + long * stride_bt + n[None, :], mask=n_in, other=0.0)
    values = tl.load(x + row * stride_xb + (h // R) * stride_xh + long * stride_xt + p[None, :], mask=p_in, other=0.0)
    dout = tl.load(dy + ((row * T + long) * H + h) * P + p[None, :], mask=p_in, other=0.0)
    tile = ((row * K + k) * H + h) * P * N + p[:, None] * N + n[None, :]
    inside = (p < P)[:, None] & (n < N)[None, :]
    sums = (row * H + h) * K * Q + k * Q
    w, r = tl.load(whole + sums + tl.arange(0, Q)), tl.load(rest + sums + tl.arange(0, Q))
    w_end, r_end = tl.load(whole + sums + Q - 1), tl.load(rest + sums + Q - 1)
    leave = tl.exp((w_end - w) + (r_end - r))
    step = tl.full((Q,), 1.0, ACC)
    if dt is not None:
        step = tl.load(dt + row * stride_db + t.to(tl.int64) * stride_dt + h * stride_dh, mask=t < T, other=0.0).to(ACC)

    dS = tl.load(dstates + tile, mask=inside, other=0.0)
    pull = tl.dot(keys, tl.trans(dS), input_precision=PRECISION, out_dtype=ACC)  # [Q, BP], of the decayed dt_j x_j
    dstep = tl.sum(pull * values.to(ACC), 1) * leave
    S = tl.load(states + tile, mask=inside, other=0.0)
    dqueries = tl.dot(dout, S, input_precision=PRECISION, out_dtype=ACC) * tl.exp(w + r)[:, None]
    entering = tl.sum(dqueries * queries.to(ACC), 1)  # flow from the state before the chunk to token i
    dmixing = tl.dot(dout, tl.trans(values), input_precision=PRECISION, out_dtype=ACC) * within(w, r, Q, False)  # [i, j]
    flow = dmixing * tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)  # from j to i, without dt_j
    dqueries = tl.dot((dmixing * step[None, :]).to(keys.dtype), keys, dqueries, input_precision=PRECISION, out_dtype=ACC)
    tl.store(dc + ((row * T + long) * H + h) * N + n[None, :], dqueries, mask=n_in)

    first, second = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    before = tl.where(first < second, 1.0, 0.0).to(ACC)  # [j, k], 1 for j before k
    passing = tl.dot(flow * step[None, :], before, input_precision=PRECISION, out_dtype=ACC)  # [i, k], from before k to i
    dlog = tl.sum(tl.where(first >= second, passing + entering[:, None], (dstep * step)[:, None]), 0)
    tl.store(da + (row * T + t.to(tl.int64)) * H + h, dlog + tl.load(across + (row * H + h) * K + k), mask=t < T)
    if ddt is not None:
        tl.store(ddt + (row * T + t.to(tl.int64)) * H + h, dstep + tl.sum(flow, 0), mask=t < T)
    if dD is not None:
        tl.store(dD + (row * K + k) * H + h, tl.sum(tl.sum(dout.to(ACC) * values.to(ACC), 1), 0))


@triton.jit
def shared_gradients(
    left, shared, right, whole, rest, dt, D, dstates, out,
    stride_lb, stride_lt, stride_lh, stride_sb, stride_st, stride_sh, stride_rb, stride_rt, stride_rh, stride_db, stride_dt, stride_dh,
    stride_s, stride_o, T, H, width_s: tl.constexpr, width_o: tl.constexpr, R: tl.constexpr,
    Q: tl.constexpr, BS: tl.constexpr, BO: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_j = sum over heads and i >= j of decay dt_j (shared_j . left_i) right_i, + what the state after the chunk asks for, + D right_j.

    dx: left = c, shared = b, right = dy. db: left = dy, shared = x, right = c. left and right have H heads, shared and out
    have G; width_s entries in left and shared, width_o in right and out; stride_s and stride_o are those of dstates along them.
    """
    G, K, k, row = tl.num_programs(0) // tl.cdiv(width_o, BO), tl.num_programs(1), tl.program_id(1), tl.program_id(2).to(tl.int64)
    g, part = tl.program_id(0) % G, tl.program_id(0) // G
    t, s, o = k * Q + tl.arange(0, Q), tl.arange(0, BS), part * BO + tl.arange(0, BO)
    long, s_in, o_in = t[:, None].to(tl.int64), (t < T)[:, None] & (s < width_s)[None, :], (t < T)[:, None] & (o < width_o)[None, :]
    keys = tl.load(shared + row * stride_sb + g * stride_sh + long * stride_st + s[None, :], mask=s_in, other=0.0)
    total = tl.zeros((Q, BO), ACC)
    for h in range(g * R, g * R + R):
        queries = tl.load(left + row * stride_lb + h * stride_lh + long * stride_lt + s[None, :], mask=s_in, other=0.0)
        values = tl.load(right + row * stride_rb + h * stride_rh + long * stride_rt + o[None, :], mask=o_in, other=0.0)
        tile = ((row * K + k) * H + h) * width_s * width_o + s[:, None] * stride_s + o[None, :] * stride_o
        dS = tl.load(dstates + tile, mask=(s < width_s)[:, None] & (o < width_o)[None, :], other=0.0)  # [BS, BO]
        sums = (row * H + h) * K * Q + k * Q
        w, r = tl.load(whole + sums + tl.arange(0, Q)), tl.load(rest + sums + tl.arange(0, Q))
        step = tl.full((Q,), 1.0, ACC)
        if dt is not None:
            step = tl.load(dt + row * stride_db + t.to(tl.int64) * stride_dt + h * stride_dh, mask=t < T, other=0.0).to(ACC)
        strength = tl.exp((tl.load(whole + sums + Q - 1) - w) + (tl.load(rest + sums + Q - 1) - r)) * step
        total += tl.dot(keys, dS, input_precision=PRECISION, out_dtype=ACC) * strength[:, None]
        mixing = tl.dot(keys, tl.trans(queries), input_precision=PRECISION, out_dtype=ACC) * within(w, r, Q, True) * step[:, None]  # [j, i]
        total = tl.dot(mixing.to(values.dtype), values, total, input_precision=PRECISION, out_dtype=ACC)
        if D is not None:
            total += values.to(ACC) * tl.load(D + h).to(ACC)
    tl.store(out + ((row * T + long) * G + g) * width_o + o[None, :], total, mask=o_in)
