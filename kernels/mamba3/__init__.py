"""The recurrence of Mamba-3: keys and queries that turn as they go, and writes by the trapezoidal rule, on top of SSD.

Shapes: B batch, T time, H query heads, G value heads (head h reads group h // R, R = H // G), P head width, N state width, S angles.
S_t = e^(a_t) S_(t-1) + (1 - l_t) dt_t e^(a_t) x_(t-1) k_(t-1)^T + l_t dt_t x_t k_t^T and y_t = S_t q_t + D x_t, where k_t and q_t are b_t
and c_t with the coordinates i and i + S, i < S, turned by the angles of all tokens up to t ("Mamba-3", arXiv 2603.15569). What follows a
token is known within a call, so both writes of x_t are one, of strength l_t dt_t + (1 - l_(t+1)) dt_(t+1), and only y_t sees one of them.
A state is [P + 1, N + 1]: S; behind it, in its last column and row, x and b of the last token, whose second write is still to come. It
stands in a frame that turns along, in which that last token has turned by nothing.
"""

import math

import torch
from torch import Tensor

from ..common import accumulator, check_rank, check_shape, document_before, documents, no_autocast
from ..ssd import ssd, ssd_matrix

__all__ = ["mamba3_matrix", "mamba3_scan", "mamba3_step"]


def mamba3_scan(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    turn: Tensor,
    dt: Tensor,
    now: Tensor,
    *,
    D: Tensor | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    chunk: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence above over a whole sequence.

    x [B, T, G, P]; a [B, T, H] log decay, at most 0; b and c [B, T, H, N]; turn [B, T, H, S] radians, 2 S <= N; dt [B, T, H]; now
    [B, T, H], l above: the share of a write that comes at once; D [H]; state [B, H, P + 1, N + 1] (None: 0). seq_idx, mask and chunk as
    in `ssd`; impl is a form of `ssd`, or "sequential".
    Returns y [B, T, H, P] in the dtype of x and the state, fp32 (fp64 for fp64 inputs). Raises `ValueError` for shapes that do not fit.
    """
    _check(x, a, b, c, turn, dt, now, D, state, seq_idx, mask)
    if mask is not None:
        a, dt = (t.masked_fill(~mask[..., None], 0) for t in (a, dt))
        turn = turn.masked_fill(~mask[..., None, None], 0)
    docs = documents(seq_idx, mask)
    with no_autocast(x):
        if impl == "sequential":
            return _in_turn(x, a, b, c, turn, dt, now, D, state, docs, mask)
        return _at_once(x, a, b, c, turn, dt, now, D, state, docs, mask, chunk, impl)


def mamba3_step(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, turn: Tensor, dt: Tensor, now: Tensor, *, state: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Advance the recurrence by one token, inputs without the time axis; returns y [B, H, P] and the new state, at least fp32."""
    H, acc = b.shape[1], accumulator(x.dtype)
    x, b, c, turn = x.to(acc).repeat_interleave(H // x.shape[1], 1), b.to(acc), c.to(acc), turn.to(acc)
    held, before, key = _unpacked(state.to(acc))
    later = ((1 - now) * dt).to(acc)[..., None, None]
    held = (held + later * before[..., None] * key[:, :, None]) * a.to(acc).exp()[..., None, None]
    held = rotated(held, -turn[:, :, None]) + (now * dt).to(acc)[..., None, None] * x[..., None] * b[:, :, None]
    y = torch.matmul(held, c[..., None]).squeeze(-1)
    y = y if D is None else torch.addcmul(y, x, D.to(acc)[:, None])
    return y, _packed(held, x, b)


def mamba3_matrix(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    turn: Tensor,
    dt: Tensor,
    now: Tensor,
    *,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    rows: slice | Tensor | None = None,
) -> Tensor:
    """The mixing matrix [B, H, I, T] of `mamba3_scan` for the given rows, without skip and initial state: y = M x for each head."""
    if mask is not None:
        turn = turn.masked_fill(~mask[..., None, None], 0)
        a, dt = (t.masked_fill(~mask[..., None], 0) for t in (a, dt))
    chosen = slice(None) if rows is None else rows
    follows = _following((1 - now) * dt, documents(seq_idx, mask), mask)
    k, q = _turned(b, c, turn)
    made = ssd_matrix(a, k, q, dt=now * dt + follows, seq_idx=seq_idx, mask=mask, rows=chosen)
    index = torch.arange(a.shape[1], device=a.device)
    own = (index[chosen][:, None] == index).to(made.dtype)  # [I, T]
    early = (follows * (b * c).sum(-1)).to(made.dtype).transpose(1, 2)  # [B, H, T]
    return made - own * early[:, :, None]


def rotated(values: Tensor, angles: Tensor) -> Tensor:
    """values [..., N] with the coordinates i and i + S, i < S, turned by angles [..., S]."""
    S = angles.shape[-1]
    cos, sin = angles.cos().to(values.dtype), angles.sin().to(values.dtype)
    first, second, rest = values.split([S, S, values.shape[-1] - 2 * S], -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def _unpacked(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S [..., P, N], x [..., P] and b [..., N] of the last token."""
    return state[..., :-1, :-1], state[..., :-1, -1], state[..., -1, :-1]


def _packed(held: Tensor, x: Tensor, b: Tensor) -> Tensor:
    body = torch.cat((held, x[..., None]), -1)
    return torch.cat((body, torch.nn.functional.pad(b, (0, 1))[..., None, :]), -2)


def _turned(b: Tensor, c: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and queries turned by the sums of the angles, which are taken in fp64: they grow with T."""
    angles = torch.remainder(turn.double().cumsum(1), 2 * math.pi)
    angles = angles.to(accumulator(b.dtype))
    return rotated(b, angles), rotated(c, angles)


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token [B, T] the next real one's place, T if there is none; and the place [B] of the last real one, -1 if there is none."""
    T = mask.shape[1]
    index = torch.arange(T, device=mask.device)
    real = torch.where(mask, index, T)
    after = torch.nn.functional.pad(real[:, 1:], (0, 1), value=T).flip(1).cummin(1).values.flip(1)
    return after, torch.where(mask, index, -1).amax(1)


def _following(later: Tensor, docs: Tensor | None, mask: Tensor | None) -> Tensor:
    """Of each token the number later [B, T, H] of the next real one, if that is of its document, else 0."""
    T = later.shape[1]
    after = torch.arange(1, T + 1, device=later.device).expand(len(later), T) if mask is None else _places(mask)[0]
    there = after < T
    after = after.clamp_max(T - 1)
    if docs is not None:
        there = there & (docs.gather(1, after) == docs)
    return later.gather(1, after[..., None].expand_as(later)) * there[..., None]


def _at_once(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, turn: Tensor, dt: Tensor, now: Tensor, D: Tensor | None, state: Tensor | None,
    docs: Tensor | None, mask: Tensor | None, chunk: int | None, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, N), P, acc = b.shape, x.shape[3], accumulator(x.dtype)
    x = x.repeat_interleave(H // x.shape[2], 2)
    later = ((1 - now) * dt).to(acc)
    follows = _following(later, docs, mask)
    k, q = _turned(b.to(acc), c.to(acc), turn)
    state = x.new_zeros(B, H, P + 1, N + 1, dtype=acc) if state is None else state.to(acc)
    held, before, key = _unpacked(state)
    last = torch.full((B,), T - 1, device=x.device) if mask is None else _places(mask)[1]
    begins = 0 if mask is None else mask.long().argmax(1)  # the first real token, or any: then nothing is written
    first = later[:, 0] if mask is None else later[torch.arange(B, device=x.device), begins] * (last >= 0)[:, None]
    held = held + first[..., None, None] * before[..., None] * key[:, :, None]
    y, held = ssd(
        x, a, k.to(x.dtype), q.to(x.dtype), dt=now * dt + follows, D=D, state=held, seq_idx=docs, mask=mask, chunk=chunk, impl=impl
    )
    own = follows * (b.to(acc) * c.to(acc)).sum(-1)  # of what y_t has of x_t too early
    own = own if mask is None else own * mask[..., None]
    y = y - (own[..., None] * x.to(acc)).to(y.dtype)
    rows, place = torch.arange(B, device=x.device), last.clamp_min(0)
    some = (last >= 0).view(B, 1, 1)
    before = torch.where(some, x[rows, place].to(acc), before)
    key = torch.where(some, b[rows, place].to(acc), key)
    return y, _packed(rotated(held, -turn.double().sum(1).to(acc)[:, :, None]), before, key)


def _in_turn(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, turn: Tensor, dt: Tensor, now: Tensor, D: Tensor | None, state: Tensor | None,
    docs: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, N), P = b.shape, x.shape[3]
    state = x.new_zeros(B, H, P + 1, N + 1, dtype=accumulator(x.dtype)) if state is None else state.to(accumulator(x.dtype))
    ys = []
    for t in range(T):
        if docs is not None:
            state = state * (docs == document_before(docs))[:, t, None, None, None]
        y, after = mamba3_step(x[:, t], a[:, t], b[:, t], c[:, t], turn[:, t], dt[:, t], now[:, t], state=state, D=D)
        real = None if mask is None else mask[:, t]
        ys.append(y if real is None else y * real[:, None, None])
        state = after if real is None else torch.where(real[:, None, None, None], after, state)
    return torch.stack(ys, 1).to(x.dtype), state


def _check(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, turn: Tensor, dt: Tensor, now: Tensor, D: Tensor | None, state: Tensor | None,
    seq_idx: Tensor | None, mask: Tensor | None,
) -> None:  # fmt: skip
    for name, tensor, letters in (("x", x, "BTGP"), ("b", b, "BTHN"), ("turn", turn, "BTHS")):
        check_rank(name, tensor, letters)
    (B, T, G, P), (H, N), S = x.shape, b.shape[2:], turn.shape[3]
    if H % G:
        raise ValueError(f"H must be a multiple of G: got H = {H} query heads and G = {G} value heads")
    if 2 * S > N:
        raise ValueError(f"S angles turn 2 S of N coordinates: got S = {S} and N = {N}")
    by_token, heads = (B, T, H), (B, T, H, N)
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "a": (a, by_token), "dt": (dt, by_token), "now": (now, by_token), "b": (b, heads), "c": (c, heads), "turn": (turn, (B, T, H, S)),
        "D": (D, (H,)), "state": (state, (B, H, P + 1, N + 1)), "seq_idx": (seq_idx, (B, T)), "mask": (mask, (B, T)),
    }  # fmt: skip
    for name, (value, shape) in shapes.items():
        check_shape(name, value, *shape)
