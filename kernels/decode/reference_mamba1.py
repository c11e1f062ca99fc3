"""Tokens of a Mamba-1 mixer between its projections in PyTorch: the CPU's form. Like the kernel it reads nothing on the host.

Shapes: B batch, T time, C = H P channels, X channels of the convolution, N state width, L slots of kept inputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from ..conv1d.ring import ring
from .reference import put


def mamba1_in_torch(zxbc: Tensor, dt: Tensor, weights: Any, held: Any, at: Any) -> Tensor:
    """`mamba1_steps`; arguments as there."""
    (B, C, _), (_, L, X), T, wide = held.state.shape, held.x.shape, zxbc.shape[1], held.state.dtype
    z, raw, b, c, _ = zxbc.tensor_split([C, C + X, C + X + held.b.shape[2], 2 * C + X + held.b.shape[2]], -1)
    put(held, at, ring(raw.to(wide), weights.conv, weights.conv_bias, "silu" if weights.silu else None, held.raw, at.length, at.new), b, dt)
    places = at.folded[:, None] + torch.arange(L, device=z.device)  # [B, L] positions behind the state
    state = _replayed(held, at, places < at.length[:, None], weights)
    folded = _replayed(held, at, places < torch.minimum(at.length, at.fold_to)[:, None], weights)
    rows, out = torch.arange(B, device=z.device), zxbc.new_zeros(B, T, C)
    for t in range(T):
        position, alive = at.length + t, at.new > t
        x, b, dt = _wide(held, weights, rows, position % L)
        step = softplus(dt + weights.dt_bias)
        after = state * (_rate(weights) * step[..., None]).exp() + (x * step)[..., None] * b
        state = torch.where(alive[:, None, None], after, state)
        folded = torch.where((alive & (position + 1 == at.fold_to))[:, None, None], state, folded)
        y = (state * _per_channel(c[:, t].to(wide), state.shape[2])).sum(-1) + weights.D * x
        out[:, t] = (y * silu(z[:, t].to(wide))).masked_fill(~alive[:, None], 0)
    held.state.copy_(folded)
    return out


def _replayed(held: Any, at: Any, real: Tensor, weights: Any) -> Tensor:
    """The state after those of the L tokens behind it that are `real` [B, L]: their writes, each with the decays that follow it."""
    slots = (at.folded[:, None] + torch.arange(real.shape[1], device=real.device)) % real.shape[1]
    x, b, dt = _wide(held, weights, torch.arange(len(slots), device=real.device)[:, None], slots)
    step = softplus(dt + weights.dt_bias).masked_fill(~real[..., None], 0)  # [B, L, C]
    later = pad(step[:, 1:].flip(1).cumsum(1).flip(1), (0, 0, 0, 1))  # of the tokens behind each
    write = ((x * step).masked_fill(~real[..., None], 0)[..., None] * b).masked_fill(~real[..., None, None], 0)  # [B, L, C, N]
    rate = _rate(weights)
    return held.state * (rate * step.sum(1)[..., None]).exp() + (write * (rate * later[..., None]).exp()).sum(1)


def _rate(weights: Any) -> Tensor:
    return -weights.A_log.to(torch.promote_types(weights.A_log.dtype, torch.float32)).exp()


def _wide(held: Any, weights: Any, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x and dt [..., C] and b [..., C, N] of these slots, for every channel, in the format of the state."""
    x, b, dt = (buffer[rows, slots].to(held.state.dtype) for buffer in (held.x, held.b, held.dt))
    C, N = held.state.shape[1:]
    return _repeat(x, weights.block, C), _per_channel(_repeat(b, weights.block, C), N), dt


def _repeat(shared: Tensor, block: int, C: int) -> Tensor:
    """Shared channels [..., G P], in blocks, for every channel [..., C]."""
    return shared.unflatten(-1, (-1, block)).repeat_interleave(C // shared.shape[-1], -2).flatten(-2)


def _per_channel(row: Tensor, N: int) -> Tensor:
    """b or c [..., C], groups of N, as every channel of the group reads it [..., C, N]."""
    return row.unflatten(-1, (-1, N)).repeat_interleave(N, -2)
