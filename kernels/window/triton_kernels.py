"""A round of new tokens over keys and values in slots in Triton: one program per group and row.

Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, M sinks, S slots. Query i of a group: head i // T,
token i % T. The new tokens' keys and values are used from registers: a slot that is read in a launch is not written in it.
"""

import triton
import triton.language as tl


@triton.jit
def turned_rows(x, at, there, p, cos, sin, angle, P: tl.constexpr, Q: tl.constexpr):
    """Heads x[at : at + P] [I, P] in fp32, the first Q coordinates turned by the cosines and sines from `angle` [I] on."""
    low = p < Q // 2
    partner = tl.where(low, p + Q // 2, tl.where(p < Q, p - Q // 2, p))
    inside, turns = there[:, None] & (p < P)[None, :], there[:, None] & (p < Q)[None, :]
    own = tl.load(x + at[:, None] + p[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + at[:, None] + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + angle[:, None] + p[None, :], mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + angle[:, None] + p[None, :], mask=turns, other=0.0).to(tl.float32)
    return own * c + tl.where(low[None, :], -other, other) * s


@triton.jit(do_not_specialize=["T"])
def window_round(
    heads, scores, y, bias, growth, shares, cos, sin, keys, values, totals, summed, length, new, out, stride_hb, stride_ht, stride_mb,
    stride_mt, T, G, scale, window, reach, whole,
    M: tl.constexpr, S: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr,
    BP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`window_steps` for one group of one row."""
    g, row, H = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0) * R
    i, u, p = tl.arange(0, ROWS), tl.arange(0, BT), tl.arange(0, BP)
    start, kept = tl.load(length + row).to(tl.int64), tl.load(new + row)
    tokens, t, h = heads + row * stride_hb, i % T, g * R + i // T
    real = i < R * T
    q = turned_rows(tokens, t * stride_ht + (2 * G + h) * P, real, p, cos, sin, (row * T + t) * Q, P, Q) * scale
    k = turned_rows(tokens, u * stride_ht + (G + g) * P, u < T, p, cos, sin, (row * T + u) * Q, P, Q).to(keys.dtype.element_ty)
    fresh = (u < T)[:, None] & (p < P)[None, :]
    v = tl.load(tokens + (u * stride_ht + g * P)[:, None] + p[None, :], mask=fresh, other=0.0).to(values.dtype.element_ty)

    back = t[:, None] - u[None, :]
    near = (back < window) | ((start + u < M)[None, :] & (back >= 0))
    seen = (back >= 0) & near & (back < reach) & (u < T)[None, :]
    among = tl.where(seen, tl.dot(q, tl.trans(k.to(tl.float32)), input_precision=PRECISION), float("-inf"))  # [ROWS, BT]
    peak = tl.maximum(tl.max(among, 1), -1e30)
    among = tl.exp(among - peak[:, None])
    weight, total = tl.sum(among, 1), tl.dot(among, v.to(tl.float32), input_precision=PRECISION)
    base = (row * G + g) * S
    done = tl.maximum(tl.load(summed + row * G + g), M)  # tokens before this one are summed
    end = tl.maximum(start + T - (S - M), M)  # and from now on those before this one, whose slots are taken: by row T of `gone`
    left = (u[:, None] - u[None, :] >= window) & (start + u >= M)[None, :] & (u < T)[:, None] & (u < T)[None, :]
    gone = tl.dot(left.to(tl.float32), v.to(tl.float32), input_precision=PRECISION)  # out of sight of each new token [BT, BP]
    for first in range(0, S, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        newest = start - 1 - M
        place = newest - (newest - (slot - M) + (S - M) * (M + 2)) % (S - M) + M
        place = tl.where(slot < M, slot, place)
        held = (slot < S) & (place < start) & (place >= tl.where(slot < M, 0, M))
        gap = (start + t)[:, None] - place[None, :]
        sight = held[None, :] & ((gap < window) | (place < M)[None, :]) & (gap < reach)
        there = held[:, None] & (p < P)[None, :]
        at = (base + slot)[:, None] * P + p[None, :]
        key = tl.load(keys + at, mask=there, other=0.0).to(tl.float32)
        score = tl.where(sight, tl.dot(q, tl.trans(key), input_precision=PRECISION), float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        share, shrink = tl.exp(score - higher[:, None]), tl.exp(peak - higher)
        value = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
        total = total * shrink[:, None] + tl.dot(share, value, input_precision=PRECISION)
        weight, peak = weight * shrink + tl.sum(share, 1), higher
        hidden = tl.where((u == T)[:, None], (place < end)[None, :], (start + u)[:, None] - place[None, :] >= window)
        far = hidden & (held & (place >= done))[None, :]
        gone += tl.dot(far.to(tl.float32), value, input_precision=PRECISION)
    place = start + u
    to = (base + tl.where(place < M, place, M + (place - M) % (S - M)))[:, None] * P + p[None, :]
    tl.store(keys + to, k, mask=fresh)
    tl.store(values + to, v, mask=fresh)
    gone += tl.load(totals + (row * G + g) * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
    tl.store(totals + (row * G + g) * P + p, tl.sum(tl.where(u[:, None] == T, gone, 0.0), 0), mask=p < P)
    tl.store(summed + row * G + g, tl.maximum(done, end))
    inside = real[:, None] & (p < P)[None, :]
    count = start + t - whole + 1  # out of sight
    hides = real & (count > 0)  # else attention alone counts
    count = tl.maximum(count, 1).to(tl.float32)
    score = tl.load(scores + row * stride_mb + t * stride_mt + h, mask=hides, other=0.0).to(tl.float32)
    score += tl.load(bias + h, mask=real, other=0.0).to(tl.float32) + tl.load(growth + h, mask=real, other=0.0).to(tl.float32) * tl.log(
        count
    )
    mass = tl.where(hides, 1.0 / (1.0 + tl.exp(peak + tl.log(weight) - score)), 0.0)
    where = ((row * T + t) * H + h)[:, None] * P + p[None, :]
    rest = tl.load(y + where, mask=inside & hides[:, None], other=0.0).to(tl.float32)
    portion = tl.load(shares + (h * P)[:, None] + p[None, :], mask=inside, other=0.0).to(tl.float32)
    sums = tl.dot((t[:, None] == u[None, :]).to(tl.float32), gone, input_precision=PRECISION)
    rest += portion * sums / count[:, None]
    made = rest * mass[:, None] + total * ((1.0 - mass) / weight)[:, None]
    tl.store(out + where, tl.where((t < kept)[:, None], made, 0.0), mask=inside)
