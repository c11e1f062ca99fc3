"""SSD in Triton: the outputs of one chunk of one head.

Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, N state width, K chunks of Q tokens.
"""

import triton
import triton.language as tl


@triton.jit
def within(w, r, Q: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """exp of the sum of the log decays after token j up to token i, 0 for j > i: [i, j], or [j, i]; w and r [Q] from `decay_sums`."""
    rows, columns = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    gap = (w[:, None] - w[None, :]) + (r[:, None] - r[None, :])
    if KEYS_FIRST:
        return tl.where(columns >= rows, tl.exp(tl.minimum(-gap, 0.0)), 0.0)
    return tl.where(rows >= columns, tl.exp(tl.minimum(gap, 0.0)), 0.0)


@triton.jit
def outputs(
    x, b, c, whole, rest, dt, D, states, y,
    stride_xb, stride_xt, stride_xh, stride_bb, stride_bt, stride_bh, stride_cb, stride_ct, stride_ch, stride_db, stride_dt, stride_dh,
    T, H, P: tl.constexpr, N: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, P] from the tokens of the chunk and the state before it; heads of a group run next to each other."""
    h, k, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    K = tl.num_programs(1)
    t, p, n = k * Q + tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    long, real = t[:, None].to(tl.int64), (t < T)[:, None]
    queries = tl.load(c + row * stride_cb + h * stride_ch + long * stride_ct + n[None, :], mask=real & (n < N)[None, :], other=0.0)
    keys = tl.load(b + row * stride_bb + (h // R) * stride_bh + long * stride_bt + n[None, :], mask=real & (n < N)[None, :], other=0.0)
    values = tl.load(x + row * stride_xb + (h // R) * stride_xh + long * stride_xt + p[None, :], mask=real & (p < P)[None, :], other=0.0)
    tile = ((row * K + k) * H + h) * P * N + p[:, None] * N + n[None, :]
    S = tl.load(states + tile, mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)
    w, r = tl.load(whole + (row * H + h) * K * Q + t), tl.load(rest + (row * H + h) * K * Q + t)
    far = tl.dot(queries, tl.trans(S), input_precision=PRECISION, out_dtype=ACC) * tl.exp(w + r)[:, None]  # [Q, BP]
    mixing = tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC) * within(w, r, Q, False)  # [i, j]
    if dt is not None:
        mixing *= tl.load(dt + row * stride_db + t.to(tl.int64) * stride_dt + h * stride_dh, mask=t < T, other=0.0).to(ACC)[None, :]
    out = tl.dot(mixing.to(values.dtype), values, far, input_precision=PRECISION, out_dtype=ACC)
    if D is not None:
        out += values.to(ACC) * tl.load(D + h).to(ACC)
    tl.store(y + ((row * T + long) * H + h) * P + p[None, :], out, mask=real & (p < P)[None, :])
