"""A recurrence as one operation of a traced graph: its loops over the length stay out of it (torch.export, torch.compile).

Inside an operation torch records no gradient of ordinary tensor operations: `run` must be one autograd function of its inputs.
The operations are registered with torch by importing `llamba`. Their gradient computes the forward pass again.
Shapes: those of the recurrence; all of them take four tensors, three that may be None, the state before, documents and a chunk's length.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ARGUMENTS = "Tensor x, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? D, Tensor? state, Tensor? docs, int chunk"

Recurrence = Callable[..., tuple[Tensor, Tensor]]


def operation(name: str, run: Recurrence, shapes: Recurrence) -> Recurrence:
    """`run`(x, a, b, c, d, D, state, docs, chunk) -> (output, last state) as `torch.ops.llamba.NAME`; `shapes`: both without values."""

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        y, last = run(*arguments)
        return y, last.contiguous()

    def backward(dy: Tensor, dlast: Tensor, *arguments: Any) -> list[Tensor]:
        given = [None if t is None else t.detach().requires_grad_() for t in arguments[:7]]
        with torch.enable_grad():
            made = run(*given, *arguments[7:])
        return [g.contiguous() for g in torch.autograd.grad(made, [t for t in given if t is not None], (dy, dlast))]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:8])
        ctx.chunk = inputs[8]

    def gradients(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        found = iter(back(dy.contiguous(), dlast.contiguous(), *tensors, ctx.chunk))
        return *(None if t is None else next(found) for t in tensors[:7]), None, None

    schemas = f"({ARGUMENTS}) -> (Tensor, Tensor)", f"(Tensor dy, Tensor dlast, {ARGUMENTS}) -> Tensor[]"
    made = torch.library.custom_op(f"llamba::{name}", forward, mutates_args=(), schema=schemas[0])
    back = torch.library.custom_op(f"llamba::{name}_backward", backward, mutates_args=(), schema=schemas[1])
    made.register_fake(shapes)
    back.register_fake(lambda dy, dlast, *arguments: [t.new_empty(t.shape) for t in arguments[:7] if t is not None])
    made.register_autograd(gradients, setup_context=keep)
    return made
