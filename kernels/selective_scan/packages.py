"""The selective scan by the package mamba-ssm, which runs where it is asked for.

Shapes: B batch, T time, C channels, S groups of b and c, N state width.
"""

from typing import Any

import torch
from torch import Tensor

from ..choice import Obstacle, load

WIDEST = 256  # entries of N


def obstacles(A: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> dict[str, Obstacle]:
    """Why the package cannot take these arguments of `selective_scan`, None where it can."""
    reason = None
    if state is not None:
        reason = "its scan begins without a state, got one"
    elif seq_idx is not None:
        reason = "its scan knows no documents, got seq_idx"
    elif A.shape[-1] > WIDEST:
        reason = f"its scan takes N up to {WIDEST}, got {A.shape[-1]}"
    return {"mamba_ssm": reason}


def by_mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, D: Tensor | None) -> tuple[Tensor, Tensor]:
    """`selective_scan_fn`, which reads dt, b and c in the dtype of x; dt is 0 at masked tokens, shapes as in `selective_scan`."""
    scan = load("selective_scan", "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    u, delta = x.transpose(1, 2), dt.to(x.dtype).transpose(1, 2)  # [B, C, T]
    keys, queries = (t.to(x.dtype).permute(0, 2, 3, 1) for t in (b, c))  # [B, S, N, T]
    y, last = scan(u, delta, A.float(), keys, queries, D=None if D is None else D.float(), return_last_state=True)
    return y.transpose(1, 2), _NoGradient.apply(last)


class _NoGradient(torch.autograd.Function):
    """The identity, for a tensor whose gradient its maker would drop."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """A tensor of the same values."""
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        """Raises `ValueError`."""
        raise ValueError("mamba-ssm's selective scan has no gradient of the last state; use impl='torch' where it is needed")
