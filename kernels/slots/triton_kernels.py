"""Attention of a few new tokens to a cache of slots in Triton: one program per row, group and part of the slots, then their sum.

Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, S slots. Query i of a group: head i // T, token i % T.
"""

import triton
import triton.language as tl


@triton.jit
def turned(x, at, p, cos, sin, P: tl.constexpr):
    """A head x[at : at + P], turned: the first half of the angles' partners stands in the second half, with a minus."""
    first = p < P // 2
    own = tl.load(x + at + p, mask=p < P, other=0.0).to(tl.float32)
    other = tl.load(x + at + tl.where(first, p + P // 2, p - P // 2), mask=p < P, other=0.0).to(tl.float32)
    return own * cos + tl.where(first, -other, other) * sin


@triton.jit(do_not_specialize=["T"])
def place_heads(
    q, k, v, cos, sin, positions, keys, values, out, T, G, S, P: tl.constexpr, R: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """One token of one group: its key and value into their slot, its queries into `out`."""
    token, g, p = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BP)
    position = tl.load(positions + token)
    c = tl.load(cos + position * P + p, mask=p < P, other=0.0).to(tl.float32)
    s = tl.load(sin + position * P + p, mask=p < P, other=0.0).to(tl.float32)
    head, slot = (token * G + g) * P, (((token // T) * S + position) * G + g) * P + p
    tl.store(keys + slot, turned(k, head, p, c, s, P), mask=p < P)
    tl.store(values + slot, tl.load(v + head + p, mask=p < P, other=0.0), mask=p < P)
    for r in tl.static_range(R):
        at = (token * G * R + g * R + r) * P
        tl.store(out + at + p, turned(q, at, p, c, s, P), mask=p < P)


@triton.jit(do_not_specialize=["T", "window"])
def part(
    q, keys, values, positions, sums, peaks, weights, T, G, S, scale, window,
    P: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted values of a part of the slots, not normalised, with the largest score and the sum of weights of each query."""
    pair, piece, pieces = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, g = (pair // G).to(tl.int64), pair % G
    i, p, j = tl.arange(0, ROWS), tl.arange(0, BP), tl.arange(0, BLOCK)
    t, real = i % T, i < R * T
    at = tl.load(positions + row * T + t, mask=real, other=0)
    begin, end = tl.load(positions + row * T), tl.load(positions + row * T + T - 1) + 1
    begin = tl.where(window > 0, tl.maximum(begin - window + 1, 0), 0)
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK), pieces) * BLOCK
    begin += piece * share
    end = tl.minimum(end, begin + share)
    inside = real[:, None] & (p < P)[None, :]
    queries = tl.load(q + ((row * T + t) * G * R + g * R + i // T)[:, None] * P + p[None, :], mask=inside, other=0.0)
    peak, weight = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, BP), tl.float32)
    for first in range(begin, end, BLOCK):
        slot = first + j
        block, there = ((row * S + slot) * G + g)[:, None] * P + p[None, :], (slot < end)[:, None] & (p < P)[None, :]
        key = tl.load(keys + block, mask=there, other=0.0)
        score = tl.dot(queries, tl.trans(key), input_precision=PRECISION) * scale
        low = tl.where(window > 0, at - window, -1)
        seen = (slot[None, :] <= at[:, None]) & (slot[None, :] > low[:, None]) & (slot < end)[None, :]
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share_of = tl.exp(score - base[:, None])
        shrink = tl.exp(peak - base)
        value = tl.load(values + block, mask=there, other=0.0)
        total = total * shrink[:, None] + tl.dot(share_of.to(value.dtype), value, input_precision=PRECISION)
        weight = weight * shrink + tl.sum(share_of, 1)
        peak = higher
    here = (pair * pieces + piece) * R * T + i
    tl.store(sums + here.to(tl.int64)[:, None] * P + p[None, :], total, mask=inside)
    tl.store(peaks + here, peak, mask=real)
    tl.store(weights + here, weight, mask=real)


@triton.jit(do_not_specialize=["T"])
def joined(sums, peaks, weights, y, T, G, P: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr):
    """The parts of one query together, normalised."""
    pair, i, p, k = tl.program_id(0), tl.program_id(1), tl.arange(0, BP), tl.arange(0, PARTS)
    at = (pair * PARTS + k) * R * T + i
    peak = tl.load(peaks + at)
    share = tl.exp(peak - tl.max(peak, 0))
    total = tl.load(sums + at.to(tl.int64)[:, None] * P + p[None, :], mask=(p < P)[None, :], other=0.0)
    made = tl.sum(total * share[:, None], 0) / tl.sum(tl.load(weights + at) * share, 0)
    row, g = (pair // G).to(tl.int64), pair % G
    tl.store(y + ((row * T + i % T) * G * R + g * R + i // T) * P + p, made, mask=p < P)
