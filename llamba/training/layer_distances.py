"""MOHAWK's alignment of layers: distances between mixing matrices and between hidden states, one layer's graph at a time.

Shapes: B batch, T time, I rows of a block, D model width, H query heads. Source: Bick et al., arXiv 2408.10189, sections 4.1 and 4.2.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from llamba.kernels.common import no_autocast
from llamba.models.mixers import Mixing

_AT_ONCE = 2**24  # elements of one block of rows [B, H, I, T]: 64 MiB in fp32


class Distances(NamedTuple):
    """Sums over target tokens: the mean over layers of their distances (with gradient), each layer's, and the number of targets."""

    loss: Tensor
    layers: dict[int, Tensor]
    targets: Tensor


class Part(NamedTuple):
    """One layer's term of a loss: a function that computes it, and the trained weights that it depends on."""

    value: Callable[[], Tensor]
    weights: list[nn.Parameter]


class _KnownGradients(torch.autograd.Function):
    """The sum of values [L] whose gradients for the weights are already known and wait for the backward pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return values.sum()

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> Any:
        ctx.gradients.reverse()  # so that each is let go as its product is made
        return (None, None, *(ctx.gradients.pop() * up for _ in range(len(ctx.gradients))))


def _sharded(weight: Tensor) -> bool:
    """Whether a weight is whole only while its module runs (FSDP2, ZeRO-3)."""
    return isinstance(weight, DTensor) or "ds_id" in weight.__dict__


def one_graph_at_a_time(parts: Sequence[Part]) -> tuple[Tensor, list[Tensor]]:
    """The sum of the parts, with gradient, and their values; the graph of one part at a time is in memory.

    Each part's gradients are taken as soon as it is computed, and handed on by the sum's own backward pass: what wraps the model (DDP,
    ZeRO-2) sees one ordinary forward and backward. Sharded weights cannot be kept whole so long; their parts are computed once more
    in the backward pass instead.
    """
    if not torch.is_grad_enabled():
        values = [part.value() for part in parts]
        return torch.stack(values).sum(), values
    if any(_sharded(weight) for part in parts for weight in part.weights):
        values = [checkpoint(part.value, use_reentrant=False) for part in parts]
        return torch.stack(values).sum(), [value.detach() for value in values]
    known: dict[nn.Parameter, Tensor] = {}
    values = []
    for part in parts:
        value = part.value()
        with no_autocast(value):
            found = torch.autograd.grad(value, part.weights)
        values.append(value.detach())
        for weight, gradient in zip(part.weights, found, strict=True):
            known[weight] = known[weight] + gradient if weight in known else gradient
    return _KnownGradients.apply(torch.stack(values), list(known.values()), *known), values


class _SquaredDistance(torch.autograd.Function):
    """Sum over rows of |student - teacher|^2 [B, H], block by block; the gradients are taken with each block."""

    @staticmethod
    def forward(ctx: Any, student: Any, teacher: Any, blocks: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        """The sum; keeps the gradients of `inputs`, where any is wanted."""
        wanted, leaves = any(ctx.needs_input_grad), [value.detach().requires_grad_() for value in inputs]
        total, gradients = torch.zeros(()), [torch.zeros_like(leaf) for leaf in leaves if wanted]
        with no_autocast(inputs[0]):
            for rows in blocks:
                with torch.set_grad_enabled(wanted):
                    part = (student(leaves, rows) - teacher(rows)).square().sum((2, 3))  # [B, H]
                    found = torch.autograd.grad(part.sum(), leaves) if wanted else ()
                for gradient, more in zip(gradients, found, strict=True):
                    gradient += more
                total = total.to(part.device) + part.detach()
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> Any:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        return (None, None, None, *(value.mul_(up.view(*up.shape, *[1] * (value.ndim - 2))) for value in gradients))


def squared_distance(student: Mixing, teacher: Mixing, sample: int | None = None) -> Tensor:
    """|M - A|_F^2 for each sequence and head [B, H], with gradient in the student's inputs.

    Exact, in blocks of rows: never a whole matrix. With `sample`, an unbiased estimate from that many rows, drawn without
    replacement and the same for all sequences and heads.
    """
    with torch.no_grad(), no_autocast(teacher.inputs[0]):
        (B, H, _, T) = teacher.rows(teacher.inputs, slice(0, 1)).shape
    device, some = teacher.inputs[0].device, T if sample is None else min(sample, T)
    rows = torch.arange(T, device=device) if some == T else torch.randperm(T, device=device)[:some].sort().values
    blocks = rows.split(max(1, _AT_ONCE // (B * H * T)))
    total: Tensor = _SquaredDistance.apply(student.rows, _without_gradient(teacher), blocks, *student.inputs)
    return total * (T / some)


def _without_gradient(mixing: Mixing) -> Callable[[Tensor], Tensor]:
    inputs = tuple(value.detach() for value in mixing.inputs)
    return torch.no_grad()(partial(mixing.rows, inputs))


def norm(squared: Tensor) -> Tensor:
    """The root, with gradient 0 at 0."""
    return (squared + torch.finfo(squared.dtype).smallest_normal).sqrt()
