"""The selective scan in blocks of tokens, with a hand-written gradient.

What does not depend on the state (decays, writes, outputs) is computed for a whole block at once; one fused
multiply-add per token is left for the recurrence. Only the state before each block is stored for the gradient.
Shapes: B batch, T time, C channels, S groups, I = C // S channels of a group, N state width, L tokens of a block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import accumulator, document_before, no_autocast
from .blocks import Gradients, block_backward, columns, cut, states, time_first


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
) -> tuple[Tensor, Tensor]:
    """The recurrence of `selective_scan`, with dt already 0 at masked tokens; shapes as there, docs [B, T]."""
    (B, _, C), (S, N), acc = x.shape, b.shape[2:], accumulator(x.dtype)
    rates = A.to(acc).view(S, C // S, N).transpose(1, 2).contiguous()  # [S, N, I]
    if state is None:
        state = x.new_zeros(B, C, N, dtype=acc)
    state = state.to(acc).view(B, S, C // S, N).transpose(2, 3).contiguous()  # [B, S, N, I]
    same = None if docs is None else (docs == document_before(docs)).t()[:, :, None, None, None]  # [T, B, 1, 1, 1]
    skip = None if D is None else D.to(acc)
    y, last = _Blocked.apply(x, dt, b, c, rates, skip, state, same, chunk)
    return y, last.transpose(2, 3).reshape(B, C, N)


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
