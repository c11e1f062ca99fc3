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
    heads, mass, y, cos, sin, keys, values, length, new, out, stride_hb, stride_ht, stride_mb, stride_mt, T, G, scale, window, reach, whole,
    M: tl.constexpr, S: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr,
    BP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`window_steps` for one group of one row."""
    g, row, H = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0) * R
    i, u, p = tl.arange(0, ROWS), tl.arange(0, BT), tl.arange(0, BP)
    start, count = tl.load(length + row).to(tl.int64), tl.load(new + row)
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
    place = start + u
    to = (base + tl.where(place < M, place, M + (place - M) % (S - M)))[:, None] * P + p[None, :]
    tl.store(keys + to, k, mask=fresh)
    tl.store(values + to, v, mask=fresh)
    inside = real[:, None] & (p < P)[None, :]
    hides = real & (start + t >= whole)  # else nothing is out of sight, and attention alone counts
    left = 1.0 - tl.load(mass + row * stride_mb + t * stride_mt + h, mask=hides, other=0.0).to(tl.float32)
    where = ((row * T + t) * H + h)[:, None] * P + p[None, :]
    made = tl.load(y + where, mask=inside & hides[:, None], other=0.0).to(tl.float32) + total * (left / weight)[:, None]
    tl.store(out + where, tl.where((t < count)[:, None], made, 0.0), mask=inside)
