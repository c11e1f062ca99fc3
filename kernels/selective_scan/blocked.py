"""The selective scan in blocks of tokens, with a hand-written gradient.

What does not depend on the state (decays, writes, outputs) is computed for a whole block at once; one fused
multiply-add per token is left for the recurrence. Only the state before each block is stored for the gradient.
Shapes: B batch, T time, C channels, S groups, I = C // S channels of a group, N state width, L tokens of a block.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import accumulator, document_before, no_autocast
from .blocks import Gradients, block_backward, columns, cut, states, time_first

Core = Callable[..., tuple[Tensor, Tensor]]


def blocked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    docs: Tensor | None,
    chunk: int,
    core: Core | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `selective_scan`, with dt already 0 at masked tokens; shapes as there, docs [B, T].

    core: `grouped`, or the operation of a traced graph that stands for it.
    """
    (B, _, C), (S, N), acc = x.shape, b.shape[2:], accumulator(x.dtype)
    rates = A.to(acc).view(S, C // S, N).transpose(1, 2).contiguous()  # [S, N, I]
    if state is not None:
        state = state.to(acc).view(B, S, C // S, N).transpose(2, 3).contiguous()  # [B, S, N, I]
    y, last = (core or grouped)(x, dt, rates, b, c, None if D is None else D.to(acc), state, docs, chunk)
    return y, last.transpose(2, 3).reshape(B, C, N)


def grouped(
    x: Tensor, dt: Tensor, rates: Tensor, b: Tensor, c: Tensor, D: Tensor | None, state: Tensor | None, docs: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """`blocked` by groups: rates [S, N, I], state [B, S, N, I]. It is one autograd function and nothing else that has a gradient."""
    if state is None:
        state = rates.new_zeros(x.shape[0], *rates.shape)
    same = None if docs is None else (docs == document_before(docs)).t()[:, :, None, None, None]  # [T, B, 1, 1, 1]
    y, last = _Blocked.apply(x, dt, b, c, rates, D, state, same, chunk)
    return y, last


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        b: Tensor,
        c: Tensor,
        rates: Tensor,
        D: Tensor | None,
        state: Tensor,
        same: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        y, kept = torch.empty_like(x), []
        for start in range(0, x.shape[1], chunk):
            kept.append(state)
            block = cut(x, dt, b, c, rates, same, start, start + chunk)
            run = states(block, state)
            out = columns(block.c, run[1:])
            if D is not None:
                out.addcmul_(block.x, D.view(out.shape[2:]))
            y[:, start : start + chunk] = out.flatten(2).transpose(0, 1)
            state = run[-1].clone()
        ctx.save_for_backward(x, dt, b, c, rates, D, same, *kept)
        ctx.chunk = chunk
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, b, c, rates, D, same, *kept = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (x, dt, b, c)]
        drates, dD = torch.zeros_like(rates), None if D is None else torch.zeros_like(D)
        with no_autocast(dy):
            for k in reversed(range(len(kept))):
                start, stop = k * ctx.chunk, (k + 1) * ctx.chunk
                block = cut(x, dt, b, c, rates, same, start, stop)
                part = block_backward(block, rates, D, kept[k], time_first(dy, start, stop, b.shape[2]), dlast)
                _store(part, grads, start, stop)
                drates += part.rates
                if dD is not None and part.D is not None:
                    dD += part.D
                dlast = part.state
        return *grads, drates, dD, dlast, None, None


def _store(part: Gradients, grads: list[Tensor], start: int, stop: int) -> None:
    """Write the gradients of a block to their tokens of grads (x, dt, b, c)."""
    for whole, block in zip(grads, part[:4], strict=True):
        target = whole[:, start:stop]
        target.copy_(block.transpose(0, 1).reshape(target.shape))
