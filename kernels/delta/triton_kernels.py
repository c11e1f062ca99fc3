"""The delta rule in Triton: what a chunk's tokens solve among themselves, the states between chunks, and one token.

Shapes: K chunks, B batch, Q tokens of a chunk, H query heads, G key/value heads, R = H // G, P head width, N state width.
"""

import triton
import triton.language as tl


@triton.jit
def invert(system, inverse, Q: tl.constexpr, BQ: tl.constexpr, ACC: tl.constexpr):
    """(I + tril(system, -1))^-1 of one matrix [Q, Q], row after row; on and above its diagonal `system` may hold anything."""
    matrix = tl.program_id(0).to(tl.int64) * Q * Q
    rows, columns = tl.arange(0, BQ), tl.arange(0, BQ)
    made = tl.where(rows[:, None] == columns[None, :], 1.0, 0.0).to(ACC)
    for i in range(1, Q):
        row = tl.load(system + matrix + i * Q + rows, mask=rows < i, other=0.0)  # what row i takes of each row before it
        made = tl.where((rows == i)[:, None], made - tl.sum(row[:, None] * made, 0)[None, :], made)
    tl.store(inverse + matrix + rows[:, None] * Q + columns[None, :], made, mask=(rows < Q)[:, None] & (columns < Q)[None, :])


@triton.jit
def transfer_states(
    added, transfer, first, states, H, P: tl.constexpr, N: tl.constexpr, K, REVERSE: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BP rows of S <- S transfer + added, chunk after chunk; REVERSE: from the last chunk to the first, by the transposed.

    added [K, B, H, P, N]; transfer [K, B, H, N, N]; first [B, H, P, N]; states [K + 1, B, H, P, N] before each chunk and after the last.
    """
    head = tl.program_id(2).to(tl.int64) * H + tl.program_id(1)
    heads = tl.num_programs(2).to(tl.int64) * H
    p, n = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, BN)
    tile, inside = p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
    if REVERSE:
        square = n[:, None] + n[None, :] * N
    else:
        square = n[:, None] * N + n[None, :]
    S = tl.load(first + head * P * N + tile, mask=inside, other=0.0)
    for step in range(K):
        k = K - 1 - step if REVERSE else step
        at = k + 1 if REVERSE else k
        tl.store(states + (at * heads + head) * P * N + tile, S, mask=inside)
        T = tl.load(transfer + (k * heads + head) * N * N + square, mask=(n < N)[:, None] & (n < N)[None, :], other=0.0)
        more = tl.load(added + (k * heads + head) * P * N + tile, mask=inside, other=0.0)
        S = tl.dot(S, T, more, input_precision=PRECISION, out_dtype=ACC)
    end = 0 if REVERSE else K
    tl.store(states + (end * heads + head) * P * N + tile, S, mask=inside)


@triton.jit
def advance_rule(
    x, a, b, c, erase, write, state, y, new, stride_x, stride_b, stride_c, H, P: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    CHANNELS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BP rows of one head: the new state and their part of y [B, H, P]; what a row holds under the key is a sum of its own."""
    h, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, BN)
    value = tl.load(x + row * stride_x + (h // R) * P + p, mask=p < P, other=0.0).to(ACC)
    key = tl.load(b + row * stride_b + (h // R) * N + n, mask=n < N, other=0.0).to(ACC)
    query = tl.load(c + row * stride_c + h * N + n, mask=n < N, other=0.0).to(ACC)
    if write is not None:
        value *= tl.load(write + row * H + h).to(ACC)
    inside, tile = (p < P)[:, None] & (n < N)[None, :], (row * H + h) * P * N + p[:, None] * N + n[None, :]
    S = tl.load(state + tile, mask=inside, other=0.0).to(ACC)
    if CHANNELS:
        S *= tl.exp(tl.load(a + (row * H + h) * N + n, mask=n < N, other=0.0).to(ACC))[None, :]
    else:
        S *= tl.exp(tl.load(a + row * H + h).to(ACC))
    update = value - tl.load(erase + row * H + h).to(ACC) * tl.sum(S * key[None, :], 1)
    S += update[:, None] * key[None, :]
    tl.store(new + tile, S, mask=inside)
    tl.store(y + (row * H + h) * P + p, tl.sum(S * query[None, :], 1), mask=p < P)
