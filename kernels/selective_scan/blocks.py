"""One block of tokens of the selective scan: its layout, its states and its gradient.

Channels lie innermost, so that every operation runs along them.
Shapes: B batch, T time, C channels, S groups, I = C // S channels of a group, N state width, L tokens of a block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import accumulator, lowest_exponent


class Block(NamedTuple):
    """One block of tokens, time first, in the accumulation format."""

    x: Tensor  # [L, B, S, I]
    dt: Tensor  # [L, B, S, I]
    b: Tensor  # [L, B, S, N]
    c: Tensor  # [L, B, S, N]
    decay: Tensor  # [L, B, S, N, I]


def time_first(tensor: Tensor, start: int, stop: int, groups: int) -> Tensor:
    """Copy tokens of [B, T, ...] to [L, B, S, width] in the accumulation format."""
    view = tensor[:, start:stop].transpose(0, 1)
    out = torch.empty(view.shape, dtype=accumulator(tensor.dtype), device=tensor.device).copy_(view)
    return out.view(*out.shape[:2], groups, -1)


def cut(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, rates: Tensor, same: Tensor | None, start: int, stop: int) -> Block:
    xs, steps, bs, cs = (time_first(t, start, stop, b.shape[2]) for t in (x, dt, b, c))
    decay = torch.mul(steps[:, :, :, None], rates).clamp_(min=lowest_exponent(rates.dtype)).exp_()
    if same is not None:
        decay.mul_(same[start:stop])
    return Block(xs, steps, bs, cs, decay)


def states(block: Block, state: Tensor) -> Tensor:
    """The state before the block and after each of its tokens, [L + 1, B, S, N, I], from `state` [B, S, N, I]."""
    out = torch.empty(len(block.x) + 1, *state.shape, dtype=state.dtype, device=state.device)
    out[0] = state
    torch.mul((block.x * block.dt)[:, :, :, None], block.b[..., None], out=out[1:])
    steps = out.unbind()
    for before, after, decay in zip(steps, steps[1:], block.decay.unbind(), strict=False):
        after.addcmul_(before, decay)
    return out


def columns(row: Tensor, matrix: Tensor) -> Tensor:
    """Sum over N of row [L, B, S, N] times matrix [L, B, S, N, I]: [L, B, S, I]."""
    return torch.matmul(row[..., None, :], matrix).squeeze(-2)


def rows(matrix: Tensor, column: Tensor) -> Tensor:
    """Sum over I of matrix [L, B, S, N, I] times column [L, B, S, I]: [L, B, S, N]."""
    return torch.matmul(matrix, column[..., None]).squeeze(-1)


class Gradients(NamedTuple):
    """Gradients of a block's inputs and of the state before it."""

    x: Tensor  # [L, B, S, I]
    dt: Tensor  # [L, B, S, I]
    b: Tensor  # [L, B, S, N]
    c: Tensor  # [L, B, S, N]
    rates: Tensor  # [S, N, I]
    D: Tensor | None  # [C]
    state: Tensor  # [B, S, N, I]


def block_backward(block: Block, rates: Tensor, D: Tensor | None, state: Tensor, dy: Tensor, dlast: Tensor) -> Gradients:
    """Gradients from those of the outputs dy [L, B, S, I] and of the state after the block."""
    run = states(block, state)
    dc = rows(run[1:], dy)
    dstates = _state_gradients(block, dy, dlast)
    dwrite = columns(block.b, dstates)  # [L, B, S, I], of dt x
    db = rows(dstates, block.x * block.dt)
    dstate = dstates[0] * block.decay[0]
    flow = dstates.mul_(run[:-1]).mul_(block.decay)  # of the log decay dt A
    ddt = torch.addcmul((flow * rates).sum(-2), dwrite, block.x)
    drates = flow.mul_(block.dt[:, :, :, None]).sum((0, 1))
    dx = dwrite.mul_(block.dt)
    if D is None:
        return Gradients(dx, ddt, db, dc, drates, None, dstate)
    dx.addcmul_(dy, D.view(dy.shape[2:]))
    return Gradients(dx, ddt, db, dc, drates, (dy * block.x).sum((0, 1)).flatten(), dstate)


def _state_gradients(block: Block, dy: Tensor, dlast: Tensor) -> Tensor:
    """Gradient of the state after each token, [L, B, S, N, I]."""
    out = dy[:, :, :, None] * block.c[..., None]
    out[-1] += dlast
    steps = out.unbind()[::-1]
    for after, before, decay in zip(steps, steps[1:], block.decay.unbind()[::-1], strict=False):
        before.addcmul_(after, decay)
    return out
