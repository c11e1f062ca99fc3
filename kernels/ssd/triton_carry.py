"""SSD in Triton: sums of log decays inside a chunk, and the recurrence that carries states (or their gradients) from chunk to chunk.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, K chunks of Q tokens.
"""

import triton
import triton.language as tl


@triton.jit
def decay_sums(a, docs, whole, rest, stride_ab, stride_at, stride_ah, T, H, Q: tl.constexpr, BH: tl.constexpr):
    """Sums of a [B, T, H] from the start of each chunk, as whole numbers and rests [B, H, K Q]: their differences stay exact.

    The first token of a document counts -1024 more, so that nothing passes it: exp gives an exact 0.
    """
    k, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    t, h = k * Q + tl.arange(0, Q), tl.program_id(1) * BH + tl.arange(0, BH)
    inside = (t < T)[:, None] & (h < H)[None, :]
    log = tl.load(a + b * stride_ab + t[:, None].to(tl.int64) * stride_at + h[None, :] * stride_ah, mask=inside, other=0.0)
    log = tl.maximum(log.to(tl.float64), -1024.0)
    if docs is not None:
        here = tl.load(docs + b * T + t, mask=t < T, other=0)
        before = tl.load(docs + b * T + t - 1, mask=(t > 0) & (t <= T), other=0)
        log -= tl.where((here != before) & (t < T), 1024.0, 0.0)[:, None]
    total = tl.cumsum(log, 0)  # [Q, BH]
    rounded = tl.floor(total + 0.5)
    place = (b * H + h[None, :]) * (tl.num_programs(0) * Q) + t[:, None]
    tl.store(whole + place, rounded, mask=(h < H)[None, :])
    tl.store(rest + place, total - rounded, mask=(h < H)[None, :])


@triton.jit
def carry(
    u, v, whole, rest, dt, first, states, last, facing, across,
    stride_ub, stride_ut, stride_uh, stride_vb, stride_vt, stride_vh, stride_db, stride_dt, stride_dh,
    T, H, P: tl.constexpr, N: tl.constexpr, K, U_SHARE: tl.constexpr, V_SHARE: tl.constexpr, REVERSE: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile [BP, BN] of S <- exp(sum of a chunk) S + sum over its tokens of weight u v^T; `states` gets S before each chunk.

    Forward: u = x, v = b, weight = decay to the chunk's end times dt. REVERSE, from the last chunk to the first: u = dy, v = c,
    weight = decay from the chunk's start. Head h reads u of head h // U_SHARE and v of head h // V_SHARE.
    first and last [B, H, P, N]; states and facing [B, K, H, P, N]. Where `facing` is given, across [tiles, B, H, K] gets its product
    with S, decayed over the chunk and summed over the tile: the flow past the chunk from the state before to the one after.
    """
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(N, BN)
    p = (tl.program_id(0) // tiles) * BP + tl.arange(0, BP)
    n = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    inside, tile = (p < P)[:, None] & (n < N)[None, :], p[:, None] * N + n[None, :]
    S = tl.zeros((BP, BN), ACC)
    if first is not None:
        S += tl.load(first + (b * H + h) * P * N + tile, mask=inside, other=0.0)
    u += b * stride_ub + (h // U_SHARE) * stride_uh
    v += b * stride_vb + (h // V_SHARE) * stride_vh
    for step in range(K):
        k = K - 1 - step if REVERSE else step
        tl.store(states + ((b * K + k) * H + h) * P * N + tile, S, mask=inside)
        t = k * Q + tl.arange(0, Q)
        here = (b * H + h) * K * Q + t
        end = (b * H + h) * K * Q + k * Q + Q - 1
        w, r = tl.load(whole + here), tl.load(rest + here)
        w_end, r_end = tl.load(whole + end), tl.load(rest + end)
        if REVERSE:
            weight = tl.exp(w + r)
        else:
            weight = tl.exp((w_end - w) + (r_end - r))
        if dt is not None:
            weight *= tl.load(dt + b * stride_db + t.to(tl.int64) * stride_dt + h * stride_dh, mask=t < T, other=0.0).to(ACC)
        long = t[:, None].to(tl.int64)
        left = tl.load(u + long * stride_ut + p[None, :], mask=(t < T)[:, None] & (p < P)[None, :], other=0.0)  # [Q, BP]
        right = tl.load(v + long * stride_vt + n[None, :], mask=(t < T)[:, None] & (n < N)[None, :], other=0.0)  # [Q, BN]
        if facing is not None:
            mate = tl.load(facing + ((b * K + k) * H + h) * P * N + tile, mask=inside, other=0.0).to(ACC)
            flow = tl.sum(tl.sum(S * mate, 1), 0) * tl.exp(w_end + r_end)
            tl.store(across + ((tl.program_id(0) * tl.num_programs(2) + b) * H + h) * K + k, flow)
        weighted = (left.to(ACC) * weight[:, None]).to(right.dtype)
        S = tl.dot(tl.trans(weighted), right, S * tl.exp(w_end + r_end), input_precision=PRECISION, out_dtype=ACC)
    tl.store(last + (b * H + h) * P * N + tile, S, mask=inside)
