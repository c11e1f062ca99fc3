"""State space duality (SSD): the Mamba-2 recurrence with grouped keys and values.

Shapes: B batch, T time, H query heads, G key/value heads (head h reads group h // R, R = H // G), P head width, N state width.
Source: Dao and Gu, "Transformers are SSMs", 2024 (arXiv:2405.21060).
"""

from typing import Any

import torch
from torch import Tensor

from ..choice import Obstacle, choose
from ..common import accumulator, check_positive, check_rank, check_shape, documents, no_autocast, traced
from ..graph import operation
from .chunked import chunked
from .matrix import matrix
from .packages import by_fla, by_mamba_ssm, obstacles
from .reference import sequential
from .resume import fold, resume

__all__ = ["ssd", "ssd_fold", "ssd_matrix", "ssd_resume", "ssd_step"]

FORMS = ("torch", "sequential", "triton", "mamba_ssm", "fla")
TRITON_WIDEST = 128  # entries of P and of N that a Triton program holds
CHUNKS = {"cpu": 32}  # tokens of a chunk, by kind of device, as measured
CHUNK_ELSEWHERE = 64
CHUNKS_OF_FORMS = {"mamba_ssm": 256}  # its own default


def _shapes(x: Tensor, a: Tensor, b: Tensor, c: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    (B, T, H, N), P = c.shape, x.shape[3]
    return x.new_empty(B, T, H, P), x.new_empty(B, H, P, N, dtype=accumulator(x.dtype))


_CHUNKED = operation("ssd", chunked, _shapes)


def ssd(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    dt: Tensor | None = None,
    D: Tensor | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    chunk: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run S_t = exp(a_t) S_{t-1} + dt_t x_t b_t^T and y_t = S_t c_t + D x_t over a whole sequence.

    x [B, T, G, P]; a [B, T, H] log decay, at most 0, or [H] where it is a dt (then dt must be given; mamba_ssm takes nothing else);
    b [B, T, G, N]; c [B, T, H, N]; dt [B, T, H] write strength (None: 1);
    D [H] skip (None: no skip); state [B, H, P, N] before the first token (None: 0).
    seq_idx [B, T] non-decreasing document numbers: a document sees itself alone, and `state` belongs to document 0.
    mask [B, T] bool, True for real tokens: the others neither decay nor write the state, and their output is 0.
    impl: see `kernels.choice`; `chunk` tokens are taken together (None: what suits the device).
    Returns y [B, T, H, P] in the dtype of x and the state after the last token [B, H, P, N], fp32 (fp64 for fp64 inputs).
    Raises `ValueError` for shapes that do not fit together and for an `impl` that is unknown or cannot run here.
    """
    form = choose("ssd", impl, FORMS, x, _obstacle(x, b), obstacles(x, a, b))
    chunk = CHUNKS_OF_FORMS.get(form, CHUNKS.get(x.device.type, CHUNK_ELSEWHERE)) if chunk is None else chunk
    check_positive("chunk", chunk)
    _check(x, a, b, c, dt, D, state, seq_idx, mask)
    docs = documents(seq_idx, mask)
    if mask is not None:
        a = a if a.ndim == 1 else a.masked_fill(~mask[..., None], 0)
        dt = (torch.ones_like(a) if dt is None else dt).masked_fill(~mask[..., None], 0)
    with no_autocast(x):
        y, last = _run(form, x, a, b, c, dt, D, state, docs, chunk)
    return (y if mask is None else y.masked_fill(~mask[..., None, None], 0)), last


def _run(
    form: str,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    dt: Tensor | None,
    D: Tensor | None,
    state: Tensor | None,
    docs: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    if form == "mamba_ssm":
        assert dt is not None, "checked with a [H]"
        return by_mamba_ssm(x, a, b, c, dt, D, state, docs, chunk)
    if a.ndim == 1:
        assert dt is not None, "checked with a [H]"
        a = a.to(accumulator(x.dtype)) * dt.to(accumulator(x.dtype))
    if form == "sequential":
        return sequential(x, a, b, c, dt, D, state, docs)
    if form == "fla":
        return by_fla(x, a, b, c, dt, D, state, docs, chunk)
    if form == "triton":
        from .triton_op import fused

        return fused(x, a, b, c, dt, D, state, docs, chunk)
    return (_CHUNKED if traced(x.shape[1]) else chunked)(x, a, b, c, dt, D, state, docs, chunk)


def ssd_step(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    state: Tensor,
    dt: Tensor | None = None,
    D: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Advance the recurrence of `ssd` by one token.

    x [B, G, P]; a [B, H]; b [B, G, N]; c [B, H, N]; state [B, H, P, N]; dt [B, H]; D [H]. impl: see `kernels.choice`; Triton's step
    has no gradient, and "auto" takes PyTorch where one is recorded.
    Returns y [B, H, P] in the dtype of x and the new state; the given one is left as it is.
    Raises `ValueError` for shapes that do not fit the state, and for an `impl` that is unknown or cannot run here.
    """
    (B, H, P, N), G = state.shape, x.shape[1]
    _check_groups(H, G)
    shapes = (("x", x, (B, G, P)), ("a", a, (B, H)), ("b", b, (B, G, N)), ("c", c, (B, H, N)), ("dt", dt, (B, H)), ("D", D, (H,)))
    for name, tensor, shape in shapes:
        check_shape(name, tensor, *shape)
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, a, b, c, state, dt, D))
    obstacle = "its one-token step has no gradient; call it under torch.no_grad()" if needed else _obstacle(x, b)
    if choose("ssd_step", impl, ("torch", "triton"), x, obstacle) == "triton":
        from .triton_step import fused_step

        return fused_step(x, a, b, c, dt, D, state)
    acc = accumulator(x.dtype)
    value = x.to(acc)[:, :, None]  # [B, G, 1, P]
    write = value.expand(B, G, H // G, P) if dt is None else value * dt.view(B, G, H // G, 1)  # [B, G, R, P]
    kept = (state * a.to(acc).exp()[..., None, None]).view(B * G, -1, N)  # [B * G, R * P, N]
    new = kept.addcmul_(write.reshape(B * G, -1, 1), b.to(acc).reshape(B * G, 1, N)).view(B, H, P, N)
    with no_autocast(x):
        y = torch.matmul(new, c.to(acc)[..., None]).view(B, G, H // G, P)
    if D is not None:
        y = torch.addcmul(y, value, D.to(acc).view(G, H // G, 1))
    return y.view(B, H, P).to(x.dtype), new


def ssd_resume(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    firsts: Tensor | int,
    dt: Tensor | None = None,
    D: Tensor | None = None,
    state: Tensor | None = None,
    ancestors: Tensor | None = None,
) -> Tensor:
    """The outputs of `ssd` for T tokens of a short sequence of S: those at firsts .. firsts + T - 1, a row its own if firsts is [B].

    x [B, S, G, P]; a [B, S, H]; b [B, S, G, N]; c [B, T, H, N] of the tokens; dt [B, S, H]; D [H]; state [B, H, P, N] before the
    sequence. What stands behind a row's tokens does not matter. Memory and work grow with T S.
    ancestors [M, M] bool, M >= T: the last M of the tokens up to the last one asked for are a tree, node i follows the path of the nodes j
    with ancestors[i, j] (itself included, j <= i), and the root follows the tokens before.
    Returns y [B, T, H, P].
    Raises `ValueError` for shapes that do not fit together.
    """
    check_rank("x", x, "BSGP")
    check_rank("c", c, "BTHN")
    (B, S, G, P), (H, N) = x.shape, c.shape[2:]
    _check_groups(H, G)
    for name, tensor, shape in (("a", a, (B, S, H)), ("b", b, (B, S, G, N)), ("dt", dt, (B, S, H)), ("state", state, (B, H, P, N))):
        check_shape(name, tensor, *shape)
    if ancestors is not None:
        M = ancestors.shape[0]
        check_shape("ancestors", ancestors, M, M)
        if M < c.shape[1]:
            raise ValueError(f"ancestors must have a row for each of the {c.shape[1]} tokens, got {M}")
    with no_autocast(x):
        return resume(x, a, b, c, firsts, dt, D, state, ancestors)


def ssd_fold(
    x: Tensor, a: Tensor, b: Tensor, *, dt: Tensor | None = None, mask: Tensor | None = None, state: Tensor | None = None
) -> Tensor:
    """The final state of `ssd` over a short sequence, [B, H, P, N] in at least fp32; the outputs are not computed.

    x [B, S, G, P]; a [B, S, H]; b [B, S, G, N]; dt [B, S, H]; mask [B, S], False = absent; state [B, H, P, N] before the sequence.
    Raises `ValueError` for shapes that do not fit together.
    """
    check_rank("x", x, "BSGP")
    check_rank("b", b, "BSGN")
    (B, S, G, P), H, N = x.shape, a.shape[-1], b.shape[-1]
    _check_groups(H, G)
    for name, tensor, shape in (("a", a, (B, S, H)), ("b", b, (B, S, G, N)), ("dt", dt, (B, S, H)), ("state", state, (B, H, P, N))):
        check_shape(name, tensor, *shape)
    if mask is not None:
        x, a = x.masked_fill(~mask[..., None, None], 0), a.masked_fill(~mask[..., None], 0)
    with no_autocast(x):
        return fold(x, a, b, dt, state)


def ssd_matrix(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    dt: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    rows: slice | Tensor | None = None,
) -> Tensor:
    """The mixing matrix of `ssd`: y = M x for each head, without the skip and the initial state.

    M[i, j] = (c_i . b_j) exp(a_{j+1} + ... + a_i) dt_j for j <= i in one document, both real; 0 elsewhere.
    a [B, T, H]; b [B, T, G, N]; c [B, T, H, N]; dt [B, T, H]; seq_idx and mask [B, T] as in `ssd`.
    Returns [B, H, T, T], or [B, H, I, T] for the given `rows` (a slice or I indices), which then bound the memory; fp32, or fp64
    for fp64 inputs.
    Raises `ValueError` for shapes that do not fit together.
    """
    check_rank("b", b, "BTGN")
    _check(b, a, b, c, dt, None, None, seq_idx, mask)
    with no_autocast(a):
        return matrix(a, b, c, dt, documents(seq_idx, mask), mask, slice(None) if rows is None else rows)


def _obstacle(x: Tensor, b: Tensor) -> Obstacle:
    widest = max(x.shape[-1], b.shape[-1])
    if widest > TRITON_WIDEST:
        return f"the Triton kernels of ssd hold P and N up to {TRITON_WIDEST}, got {widest}"
    return None


def _check_groups(H: int, G: int) -> None:
    if H % G:
        raise ValueError(f"H must be a multiple of G: got H = {H} query heads and G = {G} key/value heads")


def _check(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    dt: Tensor | None,
    D: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    mask: Tensor | None,
) -> None:
    check_rank("x", x, "BTGP")
    check_rank("c", c, "BTHN")
    (B, T, G, P), (H, N) = x.shape, c.shape[2:]
    check_positive("T", T)
    check_shape("c", c, B, T, H, N)
    _check_groups(H, G)
    check_shape("a", a, *((H,) if a.ndim == 1 else (B, T, H)))
    if a.ndim == 1 and dt is None:
        raise ValueError("a [H] is a rate per unit of dt, so it needs dt; got None")
    check_shape("b", b, B, T, G, N)
    check_shape("dt", dt, B, T, H)
    check_shape("D", D, H)
    check_shape("state", state, B, H, P, N)
    check_shape("seq_idx", seq_idx, B, T)
    check_shape("mask", mask, B, T)
