"""The gated delta rule in chunks: matrix products inside a chunk, a short recurrence between chunks, and a hand-written gradient.

Tokens are taken in blocks of K chunks of Q tokens: what a block makes stays in cache, and the memory beyond inputs and outputs does not
grow with T but for one state per block. The gradient computes each block again from its inputs.
Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, K chunks of a block, Q chunk length.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import accumulator, document_before, no_autocast
from ..ssd.blocks import Span, heads_first, tokens_first
from . import per_channel, per_head
from .blocks import IN_TORCH, Rule, Tools, backward, outputs, solve

BLOCK_NUMBERS = {"cpu": 1 << 20}  # numbers in the largest tensor of a block, by kind of device
BLOCK_NUMBERS_ELSEWHERE = 1 << 25


class Inputs(NamedTuple):
    """The arguments of `delta_rule`; docs has absent tokens filled in, before is the document of the state before each token."""

    x: Tensor  # [B, T, G, P]
    a: Tensor  # [B, T, H] or [B, T, H, N]
    b: Tensor  # [B, T, G, N]
    c: Tensor  # [B, T, H, N]
    erase: Tensor  # [B, T, H]
    write: Tensor | None  # [B, T, H]
    docs: Tensor | None  # [B, T]
    before: Tensor | None  # [B, T]


def chunked(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    erase: Tensor,
    write: Tensor | None,
    state: Tensor | None,
    docs: Tensor | None,
    chunk: int,
    tools: Tools = IN_TORCH,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `delta_rule`, with masked tokens already at a = erase = write = 0; shapes as in `delta_rule`, docs [B, T]."""
    if state is None:
        state = x.new_zeros(x.shape[0], c.shape[2], x.shape[3], c.shape[3], dtype=accumulator(x.dtype))
    return _Chunked.apply(x, a, b, c, erase, write, state, docs, chunk, tools)


def _spans(inputs: Inputs, chunk: int) -> list[Span]:
    """Blocks of whole chunks, then the rest of the tokens as one shorter chunk."""
    (B, T, H, N), P = inputs.c.shape, inputs.x.shape[3]
    numbers = BLOCK_NUMBERS.get(inputs.x.device.type, BLOCK_NUMBERS_ELSEWHERE)
    chunks, most = T // chunk, max(1, numbers // (B * H * max(chunk * chunk, chunk * (N + P), max(P, N) * N)))
    spans = [Span(k * chunk, min(most, chunks - k), chunk) for k in range(0, chunks, most)]
    return spans + ([Span(chunks * chunk, 1, T % chunk)] if T % chunk else [])


def _cut(inputs: Inputs, span: Span) -> tuple[ModuleType, Any, Rule]:
    """How decays are treated, the block of products, and the rule's values and gates."""
    form = per_head if inputs.a.ndim == 3 else per_channel
    x, a, b, c, erase = (heads_first(t, span) for t in inputs[:5])
    write = None if inputs.write is None else heads_first(inputs.write, span)
    docs = None if inputs.docs is None else span.view(inputs.docs)
    before = None if inputs.before is None else span.view(inputs.before)[:, :, 0]
    return form, form.cut(a, b, c, docs, before), Rule(x, erase, write)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        erase: Tensor,
        write: Tensor | None,
        state: Tensor,
        docs: Tensor | None,
        chunk: int,
        tools: Tools,
    ) -> tuple[Tensor, Tensor]:
        """Outputs y and the last state, block after block; keeps the state before each block."""
        inputs = Inputs(x, a, b, c, erase, write, docs, None if docs is None else document_before(docs))
        y = x.new_empty(*c.shape[:3], x.shape[3])
        last, states = state.to(accumulator(x.dtype)), []
        for span in _spans(inputs, chunk):
            states.append(last)
            form, block, rule = _cut(inputs, span)
            made = form.products(block)
            solved = solve(made, rule, last, tools)
            tokens_first(outputs(made, solved), y, span)
            last = solved.states[-1].clone()
        ctx.save_for_backward(*inputs, state, *states)
        ctx.chunk, ctx.tools = chunk, tools
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs, from the last block to the first."""
        saved = ctx.saved_tensors  # once: activation checkpointing gives them only once
        inputs, state, states = Inputs(*saved[:8]), saved[8], saved[9:]
        grads = [None if t is None else torch.empty_like(t) for t in inputs[:6]]
        with no_autocast(dy):
            for span, before in reversed(list(zip(_spans(inputs, ctx.chunk), states, strict=True))):
                form, block, rule = _cut(inputs, span)
                made = form.products(block)
                solved = solve(made, rule, before, ctx.tools)
                products, own, dlast = backward(made, rule, solved, heads_first(dy, span), dlast, ctx.tools)
                da, db, dc = form.gradients(block, made, products)
                for whole, part in zip(grads, (own.x, da, db, dc, own.erase, own.write), strict=True):
                    if whole is not None and part is not None:
                        tokens_first(part, whole, span)
        return *grads, dlast.to(state.dtype), None, None, None
