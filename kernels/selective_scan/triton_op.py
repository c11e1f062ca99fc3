"""The selective scan in Triton: the launches of the scan and its gradient.

All chunks run side by side but for the recurrence between them. Kept for the gradient: the inputs and the state before each chunk.
Shapes: B batch, T time, C channels, S groups of b and c, N state width, K chunks of Q tokens.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import accumulator
from ..launch import dense_rows, on_device, sums_in, width
from .triton_kernels import carry_states, chunk_ends, scan_gradients, scan_outputs

LONGEST = 32  # tokens of a chunk: a program holds its states in registers
TILE = 8192  # entries of tokens, channels and states that a program holds


def fused(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    docs: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `selective_scan`, with dt already 0 at masked tokens; shapes as there, docs [B, T]."""
    acc = accumulator(x.dtype)
    docs = None if docs is None else docs.to(torch.int32).contiguous()
    state = None if state is None else state.to(acc).contiguous()
    with on_device(x):
        return _Fused.apply(*map(dense_rows, (x, dt)), A.to(acc).contiguous(), *map(dense_rows, (b, c)), D, state, docs, chunk)


class _Tiles:
    """How the work on [B, T, C] with groups of `inner` channels and N states is cut into programs."""

    def __init__(self, x: Tensor, b: Tensor, chunk: int) -> None:
        self.S, self.N = b.shape[2:]
        (self.B, self.T, self.C), self.inner = x.shape, x.shape[2] // self.S
        Q, BN = min(LONGEST, width(chunk)), width(self.N, 1)
        BI = min(width(self.inner, 1), TILE // (Q * BN))
        self.K, self.parts = triton.cdiv(self.T, Q), triton.cdiv(self.inner, BI)
        warps = max(1, min(8, Q * BI * BN // 1024))
        self.options: dict[str, Any] = {"Q": Q, "BI": BI, "BN": BN, "ACC": sums_in(x), "num_warps": warps}

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.T, self.C, self.inner, self.N, self.parts


def _states(
    u: Tensor, dt: Tensor, A: Tensor, v: Tensor, docs: Tensor | None, first: Tensor | None, tiles: _Tiles, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The state before each chunk [B, K, C, N] and behind the last [B, C, N]; reverse: the gradients of those behind, and of the first."""
    B, K, C, N, options = tiles.B, tiles.K, tiles.C, tiles.N, tiles.options
    states, totals = (torch.empty(B, K, *shape, dtype=A.dtype, device=A.device) for shape in ((C, N), (C,)))
    strides = *u.stride()[:2], *dt.stride()[:2], *v.stride()[:3]
    chunk_ends[tiles.S * tiles.parts, K, B](u, dt, A, v, docs, states, totals, *strides, *tiles.sizes, REVERSE=reverse, **options)
    last, BC = torch.empty(B, C, N, dtype=A.dtype, device=A.device), max(1, 512 // options["BN"])
    carry_states[triton.cdiv(C, BC), B](
        states, totals, A, first, last, C, N, K, REVERSE=reverse, BC=BC, BN=options["BN"], ACC=options["ACC"], num_warps=4
    )
    return states, last


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        b: Tensor,
        c: Tensor,
        D: Tensor | None,
        state: Tensor | None,
        docs: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """Outputs y and the last state."""
        tiles, y = _Tiles(x, b, chunk), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        starts, last = _states(x, dt, A, b, docs, state, tiles, False)
        scan_outputs[tiles.S * tiles.parts, tiles.K, tiles.B](
            x, dt, A, b, c, D, docs, starts, y, *_strides(x, dt, b, c), *tiles.sizes, **tiles.options
        )
        ctx.save_for_backward(x, dt, A, b, c, D, docs, starts)
        ctx.chunk, ctx.has_state = chunk, state is not None
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs; those of A and D are summed over chunks and rows."""
        x, dt, A, b, c, D, docs, starts = ctx.saved_tensors
        tiles, dy = _Tiles(x, b, ctx.chunk), dy.contiguous()
        dends, dstate = _states(dy, dt, A, c, docs, dlast.contiguous(), tiles, True)
        dx, ddt, db, dc = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, b, c))
        dA = torch.empty(starts.shape, dtype=A.dtype, device=A.device)
        dD = None if D is None else torch.empty(dA.shape[:3], dtype=A.dtype, device=A.device)
        scan_gradients[tiles.S, tiles.K, tiles.B](
            x, dt, A, b, c, D, docs, starts, dends, dy, dx, ddt, dA, db, dc, dD, *_strides(x, dt, b, c), *tiles.sizes, **tiles.options
        )
        dskip = None if dD is None or D is None else dD.sum((0, 1)).to(D.dtype)
        return dx, ddt, dA.sum((0, 1)), db, dc, dskip, dstate if ctx.has_state else None, None, None


def _strides(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> tuple[int, ...]:
    return *x.stride()[:2], *dt.stride()[:2], *b.stride()[:3], *c.stride()[:3]
