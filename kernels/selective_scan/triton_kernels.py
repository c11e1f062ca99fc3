"""The selective scan in Triton: what each chunk of tokens adds to the state, the states between chunks, outputs and gradients.

A program holds the decays of one chunk for the channels of one block [Q, BI, BN]; nothing of that size goes to memory.
Shapes: B batch, T time, C channels, S groups of b and c, I = C // S (`inner`) channels of a group, N state width, K chunks of Q tokens.
"""

import triton
import triton.language as tl


@triton.jit
def rows(tensor, row, t, columns, stride_b, stride_t, T, last, ACC: tl.constexpr):
    """tensor[row, t, columns] as [tokens, columns] in ACC, 0 outside of T tokens and `last` columns."""
    inside = ((t >= 0) & (t < T))[:, None] & (columns < last)[None, :]
    return tl.load(tensor + row * stride_b + t[:, None].to(tl.int64) * stride_t + columns[None, :], mask=inside, other=0.0).to(ACC)


@triton.jit
def document(docs, row, t, T):
    """The document of tokens t; what stands before the first token is of document 0."""
    return tl.load(docs + row * T + t, mask=(t >= 0) & (t < T), other=0)


@triton.jit
def decays(step, rate, docs, row, t, T):
    """exp(dt A) [Q, BI, BN] from dt [Q, BI] and A [BI, BN]; 0 at the first token of a document, 1 behind the last token."""
    decay = tl.exp(step[:, :, None] * rate[None])
    if docs is not None:
        same = (document(docs, row, t, T) == document(docs, row, t - 1, T)) | (t >= T)
        decay *= tl.where(same, 1.0, 0.0).to(decay.dtype)[:, None, None]
    return decay


@triton.jit
def follow(decay, write, decay_before, write_before, decay2, write2, decay_before2, write_before2):
    """A span of tokens and the one behind it as one span: what it does to the state, and what all of it but its last token does."""
    return decay * decay2, decay2 * write + write2, decay * decay_before2, decay_before2 * write + write_before2


@triton.jit
def before_each(decay, write, first, REVERSE: tl.constexpr):
    """The state before each token of h <- decay h + write [Q, BI, BN], from `first` [BI, BN]; REVERSE: from the last token on."""
    one, zero = tl.full(decay.shape, 1.0, decay.dtype), tl.zeros(decay.shape, decay.dtype)
    _, _, kept, added = tl.associative_scan((decay, write, one, zero), 0, follow, reverse=REVERSE)
    return kept * first[None] + added


@triton.jit
def chunk_ends(
    u, dt, A, v, docs, ends, totals, stride_ub, stride_ut, stride_db, stride_dt, stride_vb, stride_vt, stride_vs,
    T, C, inner, N, PARTS, REVERSE: tl.constexpr, Q: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """ends [B, K, C, N]: the state after each chunk that starts from 0; totals [B, K, C]: its sum of dt, inf where a document starts.

    Forward: u = x, v = b. REVERSE: u = dy, v = c, and `ends` gets the gradient of the state before each chunk from its own outputs.
    The decay between two tokens is that of the sum of their steps, so the states between them are not needed.
    """
    g, k, row = tl.program_id(0) // PARTS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, n, t = (tl.program_id(0) % PARTS) * BI + tl.arange(0, BI), tl.arange(0, BN), k * Q + tl.arange(0, Q)
    channel, until = g * inner + i, tl.minimum((k + 1) * Q, T)
    inside, tile = (i < inner)[:, None] & (n < N)[None, :], channel[:, None] * N + n[None, :]
    rate = tl.load(A + tile, mask=inside, other=0.0)
    step = rows(dt, row, t, channel, stride_db, stride_dt, T, g * inner + inner, ACC)
    left = rows(u, row, t, channel, stride_ub, stride_ut, T, g * inner + inner, ACC)
    right = rows(v + g * stride_vs, row, t, n, stride_vb, stride_vt, T, N, ACC)
    if REVERSE:
        between = tl.cumsum(step, 0)  # of the chunk's tokens up to this one
        fellow = t * 0 + k * Q - 1
    else:
        left *= step
        between = tl.cumsum(rows(dt, row, t + 1, channel, stride_db, stride_dt, until, g * inner + inner, ACC), 0, reverse=True)
        fellow = t * 0 + until - 1
    weight = tl.exp(between[:, :, None] * rate[None])
    total = tl.sum(step, 0)
    if docs is not None:
        here = document(docs, row, t, T)
        weight *= tl.where(here == document(docs, row, fellow, T), 1.0, 0.0).to(ACC)[:, None, None]
        starts = tl.sum(tl.where((here != document(docs, row, t - 1, T)) & (t < T), 1, 0), 0)
        total = tl.where(starts > 0, float("inf"), total)
    end = tl.sum(weight * (left[:, :, None] * right[:, None, :]), 0)  # [BI, BN]
    at = row * tl.num_programs(1) + k
    tl.store(ends + at * C * N + tile, end, mask=inside)
    tl.store(totals + at * C + channel, total, mask=i < inner)


@triton.jit
def carry_states(
    states, totals, A, first, last, C, N, K,
    REVERSE: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Put the state before each chunk in the place of what the chunk adds to it, states [B, K, C, N]; first and last [B, C, N].

    REVERSE: from the last chunk to the first, the gradient of the state after each chunk.
    """
    row, channel, n = tl.program_id(1).to(tl.int64), tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, BN)
    inside, tile = (channel < C)[:, None] & (n < N)[None, :], channel[:, None] * N + n[None, :]
    rate = tl.load(A + tile, mask=inside, other=0.0)
    S = tl.zeros((BC, BN), ACC)
    if first is not None:
        S += tl.load(first + row * C * N + tile, mask=inside, other=0.0)
    for step in range(K):
        at = row * K + (K - 1 - step if REVERSE else step)
        added = tl.load(states + at * C * N + tile, mask=inside, other=0.0)
        tl.store(states + at * C * N + tile, S, mask=inside)
        total = tl.load(totals + at * C + channel, mask=channel < C, other=0.0)[:, None]
        passes = total < float("inf")
        S = S * tl.where(passes, tl.exp(rate * tl.where(passes, total, 0.0)), 0.0) + added
    tl.store(last + row * C * N + tile, S, mask=inside)


@triton.jit
def scan_outputs(
    x, dt, A, b, c, D, docs, starts, y,
    stride_xb, stride_xt, stride_db, stride_dt, stride_bb, stride_bt, stride_bs, stride_cb, stride_ct, stride_cs,
    T, C, inner, N, PARTS, Q: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y [B, T, C] of one chunk and block of channels, from the state before the chunk, starts [B, K, C, N]."""
    g, k, row = tl.program_id(0) // PARTS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, n, t = (tl.program_id(0) % PARTS) * BI + tl.arange(0, BI), tl.arange(0, BN), k * Q + tl.arange(0, Q)
    channel, K = g * inner + i, tl.num_programs(1)
    inside, tile = (i < inner)[:, None] & (n < N)[None, :], channel[:, None] * N + n[None, :]
    rate = tl.load(A + tile, mask=inside, other=0.0)
    step = rows(dt, row, t, channel, stride_db, stride_dt, T, g * inner + inner, ACC)
    value = rows(x, row, t, channel, stride_xb, stride_xt, T, g * inner + inner, ACC)
    keys = rows(b + g * stride_bs, row, t, n, stride_bb, stride_bt, T, N, ACC)
    queries = rows(c + g * stride_cs, row, t, n, stride_cb, stride_ct, T, N, ACC)
    decay = decays(step, rate, docs, row, t, T)
    write = (step * value)[:, :, None] * keys[:, None, :]
    state = decay * before_each(decay, write, tl.load(starts + (row * K + k) * C * N + tile, mask=inside, other=0.0), False) + write
    out = tl.sum(state * queries[:, None, :], 2)  # [Q, BI]
    if D is not None:
        out += value * tl.load(D + channel, mask=i < inner, other=0.0).to(ACC)[None, :]
    tl.store(y + (row * T + t[:, None].to(tl.int64)) * C + channel[None, :], out, mask=(t < T)[:, None] & (i < inner)[None, :])


@triton.jit
def scan_gradients(
    x, dt, A, b, c, D, docs, starts, dends, dy, dx, ddt, dA, db, dc, dD,
    stride_xb, stride_xt, stride_db, stride_dt, stride_bb, stride_bt, stride_bs, stride_cb, stride_ct, stride_cs,
    T, C, inner, N, PARTS, Q: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk and group, block of channels after block: dx and ddt [B, T, C], db and dc [B, T, S, N].

    starts and dends [B, K, C, N]: the state before the chunk, and the gradient of the one behind it. dA [B, K, C, N] and dD [B, K, C] are
    parts to be summed.
    """
    g, k, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, t, S, K = tl.arange(0, BN), k * Q + tl.arange(0, Q), tl.num_programs(0), tl.num_programs(1)
    keys = rows(b + g * stride_bs, row, t, n, stride_bb, stride_bt, T, N, ACC)
    queries = rows(c + g * stride_cs, row, t, n, stride_cb, stride_ct, T, N, ACC)
    dkeys, dqueries = tl.zeros((Q, BN), ACC), tl.zeros((Q, BN), ACC)
    for part in range(PARTS):
        i = part * BI + tl.arange(0, BI)
        channel, at = g * inner + i, row * K + k
        inside, tile = (i < inner)[:, None] & (n < N)[None, :], channel[:, None] * N + n[None, :]
        rate = tl.load(A + tile, mask=inside, other=0.0)
        step = rows(dt, row, t, channel, stride_db, stride_dt, T, g * inner + inner, ACC)
        value = rows(x, row, t, channel, stride_xb, stride_xt, T, g * inner + inner, ACC)
        dout = rows(dy, row, t, channel, T * C, C, T, g * inner + inner, ACC)
        decay = decays(step, rate, docs, row, t, T)
        write, read = (step * value)[:, :, None] * keys[:, None, :], dout[:, :, None] * queries[:, None, :]
        before = before_each(decay, write, tl.load(starts + at * C * N + tile, mask=inside, other=0.0), False)
        dstate = before_each(decay, decay * read, tl.load(dends + at * C * N + tile, mask=inside, other=0.0), True) + read
        dqueries += tl.sum((decay * before + write) * dout[:, :, None], 1)
        dkeys += tl.sum(dstate * (step * value)[:, :, None], 1)
        dwrite = tl.sum(dstate * keys[:, None, :], 2)  # [Q, BI], of dt x
        flow = decay * before * dstate  # of the log decay dt A
        dvalue, dstep = dwrite * step, dwrite * value + tl.sum(flow * rate[None], 2)
        tl.store(dA + at * C * N + tile, tl.sum(flow * step[:, :, None], 0), mask=inside)
        if D is not None:
            dvalue += dout * tl.load(D + channel, mask=i < inner, other=0.0).to(ACC)[None, :]
            tl.store(dD + at * C + channel, tl.sum(dout * value, 0), mask=i < inner)
        place, here = (row * T + t[:, None].to(tl.int64)) * C + channel[None, :], (t < T)[:, None] & (i < inner)[None, :]
        tl.store(dx + place, dvalue, mask=here)
        tl.store(ddt + place, dstep, mask=here)
    place, here = ((row * T + t[:, None].to(tl.int64)) * S + g) * N + n[None, :], (t < T)[:, None] & (n < N)[None, :]
    tl.store(db + place, dkeys, mask=here)
    tl.store(dc + place, dqueries, mask=here)
