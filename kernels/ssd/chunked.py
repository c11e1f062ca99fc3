"""SSD in chunks: matrix products inside a chunk, a short recurrence between chunks, and a hand-written gradient.

Tokens are taken in blocks of K chunks of Q tokens: the Q x Q matrices of a block stay in cache, and the memory beyond inputs
and outputs does not grow with T but for one state per block. The gradient computes each block again from its inputs.
Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, K chunks of a block, Q chunk length.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import accumulator, document_before, no_autocast
from .backward import Gradients, block_backward
from .blocks import Inputs, Span, block_forward, cut, heads_first, tokens_first

BLOCK_NUMBERS = {"cpu": 1 << 20}  # numbers in the largest tensor of a block, by kind of device
BLOCK_NUMBERS_ELSEWHERE = 1 << 25


def chunked(
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
    """The recurrence of `ssd`, with masked tokens already at a = 0 and dt = 0; shapes as in `ssd`, docs [B, T]."""
    acc = accumulator(x.dtype)
    if state is None:
        state = x.new_zeros(x.shape[0], c.shape[2], x.shape[3], c.shape[3], dtype=acc)
    return _Chunked.apply(x, a, b, c, dt, D, state, docs, chunk)


def _spans(inputs: Inputs, chunk: int) -> list[Span]:
    """Blocks of whole chunks, then the rest of the tokens as one shorter chunk."""
    (B, T, H, N), P = inputs.c.shape, inputs.x.shape[3]
    numbers = BLOCK_NUMBERS.get(inputs.x.device.type, BLOCK_NUMBERS_ELSEWHERE)
    chunks, most = T // chunk, max(1, numbers // (B * H * max(chunk * chunk, chunk * N, P * N)))
    spans = [Span(k * chunk, min(most, chunks - k), chunk) for k in range(0, chunks, most)]
    return spans + ([Span(chunks * chunk, 1, T % chunk)] if T % chunk else [])


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        dt: Tensor | None,
        D: Tensor | None,
        state: Tensor,
        docs: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """Outputs y and the last state, block after block; keeps the state before each block."""
        inputs = Inputs(x, a, b, c, dt, D, docs, None if docs is None else document_before(docs))
        y = x.new_empty(*c.shape[:3], x.shape[3])
        last, states = state.to(accumulator(x.dtype)), []
        for span in _spans(inputs, chunk):
            states.append(last)
            out, last = block_forward(cut(inputs, span), D, last)
            tokens_first(out, y, span)
        ctx.save_for_backward(*inputs, state, *states)
        ctx.chunk = chunk
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing gives them only once
        inputs, state, states = Inputs(*saved[:8]), saved[8], saved[9:]
        grads = [None if t is None else torch.empty_like(t) for t in inputs[:5]]
        grads.append(None if inputs.D is None else torch.zeros_like(inputs.D))
        with no_autocast(dy):
            for span, before in reversed(list(zip(_spans(inputs, ctx.chunk), states, strict=True))):
                part = block_backward(cut(inputs, span), inputs.D, before, heads_first(dy, span), dlast)
                _store(part, grads, span)
                dlast = part.state
        return *grads, dlast.to(state.dtype), None, None


def _store(part: Gradients, grads: list[Tensor | None], span: Span) -> None:
    """Write the gradients of a block to their tokens of grads (x, a, b, c, dt), and add to that of D."""
    for whole, block in zip(grads[:5], part[:5], strict=True):
        if whole is not None and block is not None:
            tokens_first(block, whole, span)
    if grads[5] is not None and part.D is not None:
        grads[5].add_(part.D)
