"""The delta rule in Triton: the launches.

The products of a block's matrices are one batched product each, in PyTorch; what a batched product cannot do, the inverses of many small
systems and the recurrence between chunks, is one launch each.
Shapes: K chunks, B batch, Q tokens of a chunk, H query heads, G key/value heads, P head width, N state width.
"""

import torch
import triton
from torch import Tensor

from ..common import accumulator
from ..launch import dense_rows, on_device, precision, sums_in, width
from .blocks import Tools
from .chunked import chunked
from .triton_kernels import advance_rule, invert, transfer_states

TILE = 32  # rows of a state in one program: at batch 1 there are few heads to fill the device
TILE_BETWEEN = 16  # the same of the recurrence between chunks: with 32 rows of 128 its registers spill


def fused(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, erase: Tensor, write: Tensor | None, state: Tensor | None, docs: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """The recurrence of `delta_rule`, with masked tokens already at a = erase = write = 0; shapes as in `delta_rule`, docs [B, T]."""
    with on_device(x):
        return chunked(x, a, b, c, erase, write, state, docs, chunk, Tools(_solved, _carried))


def _solved(system: Tensor, right: Tensor, transposed: bool) -> Tensor:
    system, Q = system.contiguous(), system.shape[-1]
    inverse = torch.empty(system.shape, dtype=system.dtype, device=system.device)
    with on_device(system):
        invert[system.numel() // Q**2,](system, inverse, Q=Q, BQ=width(Q), ACC=sums_in(system), num_warps=4)
    return torch.matmul(inverse.mT if transposed else inverse, right)


def _carried(added: Tensor, transfer: Tensor, first: Tensor, reverse: bool) -> Tensor:
    K, B, H, P, N = added.shape
    states = torch.empty(K + 1, B, H, P, N, dtype=added.dtype, device=added.device)
    BP = min(TILE if N <= 64 else TILE_BETWEEN, width(P))
    with on_device(added):
        transfer_states[triton.cdiv(P, BP), H, B](
            added.contiguous(), transfer.contiguous(), first.contiguous(), states, H, P=P, N=N, K=K, REVERSE=reverse, BP=BP, BN=width(N),
            ACC=sums_in(added), PRECISION=precision(added), num_warps=4 if N <= 64 else 8, num_stages=1,
        )  # fmt: skip
    return states


def fused_step(x: Tensor, a: Tensor, b: Tensor, c: Tensor, erase: Tensor, write: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """`delta_step` in one launch; shapes as there."""
    (B, H, P, N), G = state.shape, x.shape[1]
    x, b, c = (dense_rows(t.flatten(1)) for t in (x, b, c))
    y, new = torch.empty(B, H, P, dtype=x.dtype, device=x.device), torch.empty(state.shape, dtype=accumulator(x.dtype), device=x.device)
    BP = min(TILE, width(P))
    with on_device(x):
        advance_rule[triton.cdiv(P, BP), H, B](
            x, a.contiguous(), b, c, erase.contiguous(), None if write is None else write.contiguous(), state.contiguous(), y, new,
            x.stride(0), b.stride(0), c.stride(0), H, P=P, N=N, R=H // G, CHANNELS=a.ndim == 3, BP=BP, BN=width(N), ACC=sums_in(x),
            num_warps=4,
        )  # fmt: skip
    return y, new
