"""The gated delta rule with erasing and writing apart: a linear attention that takes out what it held under a key before it writes.

Shapes: B batch, T time, H query heads, G key/value heads (head h reads group h // R, R = H // G), P head width, N state width.
Sources: Yang et al., "Gated Delta Networks", 2024 (arXiv 2412.06464); "Kimi Linear", 2025 (arXiv 2510.26692) for a decay per key channel.
There erase = write = beta; with erase = 0 and no decay this is linear attention.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..choice import Obstacle, choose
from ..common import accumulator, check_positive, check_rank, check_shape, documents, no_autocast, traced
from ..graph import operation
from .chunked import chunked
from .matrix import matrix
from .packages import by_fla, obstacles
from .reference import sequential
from .resume import fold, resume

__all__ = ["delta_fold", "delta_matrix", "delta_resume", "delta_rule", "delta_step"]

FORMS = ("torch", "sequential", "triton", "fla")
TRITON_WIDEST = 128  # entries of P and of N that a Triton program holds
CHUNKS = {"cpu": 32}  # tokens of a chunk, by kind of device, as measured
CHUNK_ELSEWHERE = 64


def _made(x: Tensor, a: Tensor, b: Tensor, c: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    (B, T, H, N), P = c.shape, x.shape[3]
    return x.new_empty(B, T, H, P), x.new_empty(B, H, P, N, dtype=accumulator(x.dtype))


_CHUNKED = operation("delta_rule", chunked, _made)


def delta_rule(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    erase: Tensor,
    *,
    write: Tensor | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    chunk: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run S_t = S' + u_t b_t^T, S' = S_{t-1} diag(exp(a_t)), u_t = write_t x_t - erase_t S' b_t, and y_t = S_t c_t over a whole sequence.

    x [B, T, G, P] values; a [B, T, H] log decay, at most 0, or [B, T, H, N], one for each key channel; b [B, T, G, N] keys, of length 1
    where erase is not 0 (the state grows without bound where erase |b|^2 > 2); c [B, T, H, N] queries; erase [B, T, H] in 0 .. 1;
    write [B, T, H] (None: 1); state [B, H, P, N] before the first token (None: 0).
    seq_idx [B, T] non-decreasing document numbers: a document sees itself alone, and `state` belongs to document 0.
    mask [B, T] bool, True for real tokens: the others neither decay nor change the state, and their output is 0.
    impl: see `kernels.choice`; `chunk` tokens are taken together (None: what suits the device).
    Returns y [B, T, H, P] in the dtype of x and the state after the last token [B, H, P, N], fp32 (fp64 for fp64 inputs).
    Raises `ValueError` for shapes that do not fit together and for an `impl` that is unknown or cannot run here.
    """
    form = choose("delta_rule", impl, FORMS, x, _obstacle(x, b), obstacles(x, b))
    chunk = CHUNKS.get(x.device.type, CHUNK_ELSEWHERE) if chunk is None else chunk
    check_positive("chunk", chunk)
    _check(x, a, b, c, erase, write, state, seq_idx, mask)
    docs = documents(seq_idx, mask)
    if mask is not None:
        a = a.masked_fill(~mask.view(*mask.shape, *[1] * (a.ndim - 2)), 0)
        erase = erase.masked_fill(~mask[..., None], 0)
        write = (torch.ones_like(erase) if write is None else write).masked_fill(~mask[..., None], 0)
    with no_autocast(x):
        y, last = _form(form, traced(x.shape[1]))(x, a, b, c, erase, write, state, docs, chunk)
    return (y if mask is None else y.masked_fill(~mask[..., None, None], 0)), last


def _form(name: str, in_graph: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    if name == "triton":
        from .triton_op import fused

        return fused
    return {"sequential": sequential, "fla": by_fla, "torch": _CHUNKED if in_graph else chunked}[name]


def delta_step(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, erase: Tensor, *, state: Tensor, write: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Advance the recurrence of `delta_rule` by one token.

    x [B, G, P]; a [B, H] or [B, H, N]; b [B, G, N]; c [B, H, N]; erase [B, H]; write [B, H]; state [B, H, P, N]. impl: see
    `kernels.choice`; Triton's step has no gradient, and "auto" takes PyTorch where one is recorded.
    Returns y [B, H, P] in the dtype of x and the new state; the given one is left as it is.
    Raises `ValueError` for shapes that do not fit the state, and for an `impl` that is unknown or cannot run here.
    """
    (B, H, P, N), G = state.shape, x.shape[1]
    _check_groups(H, G)
    shapes = (("x", x, (B, G, P)), ("a", a, (B, H, N)[: a.ndim]), ("b", b, (B, G, N)), ("c", c, (B, H, N)), ("erase", erase, (B, H)))
    for name, tensor, shape in (*shapes, ("write", write, (B, H))):
        check_shape(name, tensor, *shape)
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, a, b, c, erase, write, state))
    obstacle = "its one-token step has no gradient; call it under torch.no_grad()" if needed else _obstacle(x, b)
    if choose("delta_step", impl, ("torch", "triton"), x, obstacle) == "triton":
        from .triton_op import fused_step

        return fused_step(x, a, b, c, erase, write, state)
    acc = accumulator(x.dtype)
    decay = a.to(acc).exp()
    kept = state * (decay[..., None, None] if a.ndim == 2 else decay[:, :, None])
    key = b.to(acc).repeat_interleave(H // G, 1)  # [B, H, N]
    value = x.to(acc)[:, :, None].expand(B, G, H // G, P).reshape(B, H, P)
    value = value if write is None else value * write.to(acc)[..., None]
    with no_autocast(x):
        update = torch.addcmul(value, torch.matmul(kept, key[..., None]).squeeze(-1), erase.to(acc)[..., None], value=-1)
        new = torch.addcmul(kept, update[..., None], key[:, :, None])
        y = torch.matmul(new, c.to(acc)[..., None]).squeeze(-1)
    return y.to(x.dtype), new


def delta_resume(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    erase: Tensor,
    *,
    u: Tensor,
    firsts: Tensor | int,
    write: Tensor | None = None,
    state: Tensor | None = None,
    ancestors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The outputs of `delta_rule` and the updates u for T tokens of a short sequence of S: those at firsts .. firsts + T - 1.

    A row has a first token of its own where firsts is [B]. x [B, T, G, P], c [B, T, H, N], erase and write [B, T, H] of the tokens;
    a [B, S, H] or [B, S, H, N] and b [B, S, G, N] of the sequence; u [B, S, H, P] the updates of the tokens before them. What stands
    in u from the tokens on, and in a and b behind them, does not matter. With its updates kept a sequence needs no second replay:
    the state is a sum of u_s b_s^T with decays. state [B, H, P, N] before the sequence.
    ancestors [M, M] bool, M >= T: the last M of the tokens up to the last one asked for are a tree, node i follows the path of the nodes j
    with ancestors[i, j] (itself included, j <= i), and the root follows the tokens before.
    Returns y [B, T, H, P] in the dtype of x and u [B, T, H, P], at least fp32.
    Raises `ValueError` for shapes that do not fit together.
    """
    check_rank("x", x, "BTGP")
    check_rank("b", b, "BSGN")
    (B, T, G, P), (S, N), H = x.shape, b.shape[1::2], c.shape[2]
    _check_groups(H, G)
    _check_shapes(a, erase, write, state, (B, S, H, P, N), T)
    for name, tensor, shape in (("b", b, (B, S, G, N)), ("c", c, (B, T, H, N)), ("u", u, (B, S, H, P))):
        check_shape(name, tensor, *shape)
    if ancestors is not None:
        M = ancestors.shape[0]
        check_shape("ancestors", ancestors, M, M)
        if M < T:
            raise ValueError(f"ancestors must have a row for each of the {T} tokens, got {M}")
    with no_autocast(x):
        return resume(x, a, b, c, erase, u, firsts, write, state, ancestors)


def delta_fold(u: Tensor, a: Tensor, b: Tensor, *, mask: Tensor | None = None, state: Tensor | None = None) -> Tensor:
    """The final state of `delta_rule` over a short sequence whose updates are known, [B, H, P, N] in at least fp32.

    u [B, S, H, P]; a [B, S, H] or [B, S, H, N]; b [B, S, G, N]; mask [B, S], False = absent; state [B, H, P, N] before the sequence.
    Raises `ValueError` for shapes that do not fit together.
    """
    check_rank("u", u, "BSHP")
    check_rank("b", b, "BSGN")
    (B, S, H, P), (G, N) = u.shape, b.shape[2:]
    _check_groups(H, G)
    _check_shapes(a, None, None, state, (B, S, H, P, N), S)
    check_shape("b", b, B, S, G, N)
    if mask is not None:
        u, a = u.masked_fill(~mask[..., None, None], 0), a.masked_fill(~mask.view(B, S, *[1] * (a.ndim - 2)), 0)
    with no_autocast(u):
        return fold(u, a, b, state)


def delta_matrix(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    erase: Tensor,
    *,
    write: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    rows: slice | Tensor | None = None,
) -> Tensor:
    """The mixing matrix of `delta_rule` with one decay per head: y = M x for each head, without the initial state.

    a [B, T, H]; b [B, T, G, N]; c [B, T, H, N]; erase and write [B, T, H]; seq_idx and mask [B, T] as in `delta_rule`.
    Returns [B, H, T, T], or [B, H, I, T] for the given `rows` (a slice or I indices); the memory is that of one whole matrix, of what
    the tokens erase of each other. fp32, or fp64 for fp64 inputs.
    Raises `ValueError` for shapes that do not fit together.
    """
    check_rank("a", a, "BTH")
    check_rank("b", b, "BTGN")
    _check(b, a, b, c, erase, write, None, seq_idx, mask)
    with no_autocast(a):
        return matrix(a, b, c, erase, write, documents(seq_idx, mask), mask, slice(None) if rows is None else rows)


def _obstacle(x: Tensor, b: Tensor) -> Obstacle:
    widest = max(x.shape[-1], b.shape[-1])
    return f"the Triton kernels of delta_rule hold P and N up to {TRITON_WIDEST}, got {widest}" if widest > TRITON_WIDEST else None


def _check_groups(H: int, G: int) -> None:
    if H % G:
        raise ValueError(f"H must be a multiple of G: got H = {H} query heads and G = {G} key/value heads")


def _check_shapes(
    a: Tensor, erase: Tensor | None, write: Tensor | None, state: Tensor | None, sizes: tuple[int, int, int, int, int], tokens: int
) -> None:
    B, S, H, P, N = sizes
    check_shape("a", a, *((B, S, H, N) if a.ndim == 4 else (B, S, H)))
    for name, tensor, shape in (("erase", erase, (B, tokens, H)), ("write", write, (B, tokens, H)), ("state", state, (B, H, P, N))):
        check_shape(name, tensor, *shape)


def _check(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    erase: Tensor,
    write: Tensor | None,
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
    _check_shapes(a, erase, write, state, (B, T, H, P, N), T)
    check_shape("b", b, B, T, G, N)
    check_shape("seq_idx", seq_idx, B, T)
    check_shape("mask", mask, B, T)
