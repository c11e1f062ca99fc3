"""The selective scan of Mamba-1: a recurrence with a decay of its own for each channel and state entry.

Shapes: B batch, T time, C channels, S groups of b and c (channel i reads group i // (C // S)), N state width.
Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023 (arXiv:2312.00752).
"""

from typing import Any

import torch
from torch import Tensor

from ..choice import Obstacle, choose
from ..common import accumulator, check_positive, check_rank, check_shape, documents, no_autocast, traced
from ..graph import operation
from .blocked import blocked, grouped
from .packages import by_mamba_ssm, obstacles
from .reference import sequential

__all__ = ["selective_scan", "selective_scan_step"]

FORMS = ("torch", "sequential", "triton", "mamba_ssm")
TRITON_WIDEST = 256  # entries of N that a Triton program holds


def _shapes(x: Tensor, dt: Tensor, rates: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), rates.new_empty(x.shape[0], *rates.shape)


_GROUPED = operation("selective_scan", grouped, _shapes)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    D: Tensor | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run h <- exp(dt A) h + dt b x and y = sum_n c h + D x for each channel over a whole sequence.

    x and dt [B, T, C], dt at least 0; A [C, N], negative; b and c [B, T, S, N]; D [C] skip (None: no skip);
    state [B, C, N] before the first token (None: 0).
    seq_idx [B, T] non-decreasing document numbers: a document sees itself alone, and `state` belongs to document 0.
    mask [B, T] bool, True for real tokens: the others neither decay nor write the state, and their output is 0.
    The tokens are taken in blocks of `chunk`, which bounds the memory (Triton takes at most 32). impl: see `kernels.choice`.
    Returns y [B, T, C] in the dtype of x and the state after the last token [B, C, N], fp32 (fp64 for fp64 inputs).
    Raises `ValueError` for shapes that do not fit together and for an `impl` that is unknown or cannot run here.
    """
    form = choose("selective_scan", impl, FORMS, x, _obstacle(b), packages=obstacles(A, state, seq_idx))
    check_positive("chunk", chunk)
    _check(x, dt, A, b, c, D, state, seq_idx, mask)
    docs = documents(seq_idx, mask)
    if mask is not None:
        dt = dt.masked_fill(~mask[..., None], 0)
    with no_autocast(x):
        if form == "sequential":
            y, last = sequential(x, dt, A, b, c, D, state, docs)
        elif form == "triton":
            from .triton_op import fused

            y, last = fused(x, dt, A, b, c, D, state, docs, chunk)
        elif form == "mamba_ssm":
            y, last = by_mamba_ssm(x, dt, A, b, c, D)
        else:
            y, last = blocked(x, dt, A, b, c, D, state, docs, chunk, _GROUPED if traced(x.shape[1]) else grouped)
    return (y if mask is None else y.masked_fill(~mask[..., None], 0)), last


def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, *, state: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Advance the recurrence of `selective_scan` by one token.

    x and dt [B, C]; A [C, N]; b and c [B, S, N]; state [B, C, N]; D [C].
    Returns y [B, C] in the dtype of x and the new state; the given one is left as it is.
    Raises `ValueError` if x and b do not fit the state.
    """
    B, C, N = state.shape
    S, acc = b.shape[1], accumulator(x.dtype)
    check_shape("x", x, B, C)
    check_shape("b", b, B, S, N)
    _check_groups(C, S)
    value, step = x.to(acc), dt.to(acc)
    kept = torch.exp(step[..., None] * A.to(acc)).mul(state).view(B, S, C // S, N)
    write = (value * step).view(B, S, C // S, 1)
    new = kept.addcmul_(write, b.to(acc)[:, :, None])  # [B, S, C // S, N]
    with no_autocast(x):
        y = torch.matmul(new, c.to(acc)[..., None]).view(B, C)
    if D is not None:
        y = torch.addcmul(y, value, D.to(acc))
    return y.to(x.dtype), new.view(B, C, N)


def _obstacle(b: Tensor) -> Obstacle:
    N = b.shape[-1]
    return f"the Triton kernels of selective_scan hold N up to {TRITON_WIDEST}, got {N}" if N > TRITON_WIDEST else None


def _check_groups(C: int, S: int) -> None:
    if C % S:
        raise ValueError(f"C must be a multiple of S: got C = {C} channels and S = {S} groups")


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    mask: Tensor | None,
) -> None:
    check_rank("x", x, "BTC")
    check_rank("b", b, "BTSN")
    (B, T, C), (S, N) = x.shape, b.shape[2:]
    check_positive("T", T)
    _check_groups(C, S)
    check_shape("dt", dt, B, T, C)
    check_shape("A", A, C, N)
    check_shape("b", b, B, T, S, N)
    check_shape("c", c, B, T, S, N)
    check_shape("D", D, C)
    check_shape("state", state, B, C, N)
    check_shape("seq_idx", seq_idx, B, T)
    check_shape("mask", mask, B, T)
