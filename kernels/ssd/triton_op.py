"""SSD in Triton: the launches of the chunked form and its gradient.

Beyond inputs and outputs the forward pass keeps one state per chunk, in the dtype of x and only while it runs; the gradient
computes them again. Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, K chunks of Q tokens.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import accumulator
from ..launch import dense_rows, on_device, precision, sums_in, width
from .triton_carry import carry, decay_sums
from .triton_gradients import head_gradients, shared_gradients
from .triton_outputs import outputs

WIDEST = 128  # entries of P and of N that a program holds
TILE = 64  # entries of P and of N of one program where the work splits along them: at batch 1 there are few heads to fill the device


class Tensors(NamedTuple):
    """The arguments of `ssd` as the kernels take them: last axes contiguous, x, b and c of one dtype."""

    x: Tensor  # [B, T, G, P]
    a: Tensor  # [B, T, H]
    b: Tensor  # [B, T, G, N]
    c: Tensor  # [B, T, H, N]
    dt: Tensor | None  # [B, T, H]
    D: Tensor | None  # [H]
    docs: Tensor | None  # [B, T]


class Sums(NamedTuple):
    """What `decay_sums` leaves, [B, H, K Q] each."""

    whole: Tensor
    rest: Tensor


def fused(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, dt: Tensor | None, D: Tensor | None, state: Tensor | None, docs: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """The recurrence of `ssd`, with masked tokens already at a = 0 and dt = 0; shapes as in `ssd`, docs [B, T]."""
    x, b, c = dense_rows(x), dense_rows(b.to(x.dtype)), dense_rows(c.to(x.dtype))
    with on_device(x):
        return _Fused.apply(x, a, b, c, dt, D, state, None if docs is None else docs.to(torch.int32).contiguous(), chunk)


def _options(x: Tensor, P: int, N: int, Q: int) -> dict[str, Any]:
    return {"Q": Q, "BP": width(P), "BN": width(N), "ACC": sums_in(x), "PRECISION": precision(x)}


def _sum_decays(a: Tensor, docs: Tensor | None, wide: torch.dtype, Q: int) -> Sums:
    (B, T, H), K, BH = a.shape, triton.cdiv(a.shape[1], Q), min(16, triton.next_power_of_2(a.shape[2]))
    whole, rest = torch.empty(2, B, H, K * Q, dtype=wide, device=a.device).unbind()
    decay_sums[K, triton.cdiv(H, BH), B](a, docs, whole, rest, *a.stride(), T, H, Q=Q, BH=BH, num_warps=4)
    return Sums(whole, rest)


def _carry(
    u: Tensor, v: Tensor, sums: Sums, dt: Tensor | None, first: Tensor | None, Q: int, facing: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """States before each chunk [B, K, H, P, N], in the dtype of u, and the last one [B, H, P, N].

    With the states as `facing`: the gradients of the states after each chunk, that of the first, and the flows [B, H, K].
    """
    (B, T, _, P), N, H, K = u.shape, v.shape[3], sums.whole.shape[1], sums.whole.shape[2] // Q
    states = torch.empty(B, K, H, P, N, dtype=u.dtype, device=u.device)
    last = torch.empty(B, H, P, N, dtype=accumulator(u.dtype), device=u.device)
    options = _options(u, min(P, TILE), min(N, TILE), Q)
    tiles = triton.cdiv(P, options["BP"]) * triton.cdiv(N, options["BN"])
    across = None if facing is None else torch.empty(tiles, B, H, K, dtype=last.dtype, device=u.device)
    carry[tiles, H, B](
        u, v, *sums, dt, first, states, last, facing, across, *u.stride()[:3], *v.stride()[:3], *_strides(dt), T, H, P, N, K,
        U_SHARE=H // u.shape[2], V_SHARE=H // v.shape[2], REVERSE=facing is not None, **options, num_warps=4, num_stages=3,
    )  # fmt: skip
    return states, last, None if across is None else across.sum(0)


def _shared(
    left: Tensor, shared: Tensor, right: Tensor, sums: Sums, dt: Tensor | None, D: Tensor | None, dstates: Tensor, strides: tuple[int, int],
    out: Tensor,
) -> None:  # fmt: skip
    """The gradient of x or of b; see `shared_gradients`."""
    (B, T, G, inner), (H, outer), K = shared.shape, right.shape[2:], dstates.shape[1]
    tiles = {"Q": sums.whole.shape[2] // K, "BS": width(inner), "BO": width(min(outer, TILE))}
    shared_gradients[G * triton.cdiv(outer, tiles["BO"]), K, B](
        left, shared, right, *sums, dt, D, dstates, out, *left.stride()[:3], *shared.stride()[:3], *right.stride()[:3], *_strides(dt),
        *strides, T, H, inner, outer, R=H // G, **tiles, ACC=sums_in(left), PRECISION=precision(left), num_warps=4, num_stages=2,
    )  # fmt: skip


def _strides(dt: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if dt is None else dt.stride()


def _layout(inputs: Tensors) -> tuple[int, ...]:
    """Strides of x, b, c and dt, then T, H, P, N, as both kernels of a chunk take them."""
    x, b, c = inputs.x, inputs.b, inputs.c
    return *x.stride()[:3], *b.stride()[:3], *c.stride()[:3], *_strides(inputs.dt), x.shape[1], c.shape[2], x.shape[3], b.shape[3]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        """Outputs y and the last state; keeps the inputs and the sums of decays."""
        inputs = Tensors(x, a, b, c, dt, D, docs)
        (B, T, G, P), (H, N) = x.shape, c.shape[2:]
        Q = width(chunk)
        sums = _sum_decays(a, docs, accumulator(x.dtype), Q)
        first = None if state is None else state.contiguous()
        states, last, _ = _carry(x, b, sums, dt, first, Q)
        y = torch.empty(B, T, H, P, dtype=x.dtype, device=x.device)
        outputs[H, states.shape[1], B](
            x, b, c, *sums, dt, D, states, y, *_layout(inputs), R=H // G, **_options(x, P, N, Q), num_warps=4, num_stages=1
        )
        ctx.save_for_backward(*inputs, state, *sums)
        ctx.chunk = Q
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs; the states before each chunk are made again."""
        saved = ctx.saved_tensors  # once: activation checkpointing gives them only once
        inputs, state, sums, Q = Tensors(*saved[:7]), saved[7], Sums(*saved[8:]), ctx.chunk
        x, a, b, c, dt, D, _ = inputs
        (B, _, G, P), (H, N) = x.shape, c.shape[2:]
        dy = dy.contiguous()
        states, _, _ = _carry(x, b, sums, dt, None if state is None else state.contiguous(), Q)
        dstates, dstate, across = _carry(dy, c, sums, None, dlast.contiguous(), Q, facing=states)
        dx, da, db, dc = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, a, b, c))
        ddt = None if dt is None else torch.empty(dt.shape, dtype=dt.dtype, device=x.device)
        dD = None if D is None else torch.empty(B, states.shape[1], H, dtype=sums.whole.dtype, device=x.device)
        layout, options = _layout(inputs), _options(x, P, N, Q)
        head_gradients[H, states.shape[1], B](
            x, b, c, *sums, dt, states, dstates, across, dy, dc, da, ddt, dD, *layout, R=H // G, **options, num_warps=4, num_stages=1
        )
        _shared(c, b, dy, sums, dt, D, dstates, (1, N), dx)
        _shared(dy, x, c, sums, dt, None, dstates, (N, 1), db)
        dD = None if dD is None or D is None else dD.sum((0, 1)).to(D.dtype)
        return dx, da, db, dc, ddt, dD, None if state is None else dstate.to(state.dtype), None, None
