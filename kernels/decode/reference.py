"""Tokens of a Mamba-2 mixer between its projections in PyTorch: the CPU's form. Like the kernel it reads nothing on the host.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, C channels, L slots of kept inputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from ..conv1d.ring import ring
from ..window.rotation import turned


def steps_in_torch(zxbcdt: Tensor, weights: Any, held: Any, at: Any, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`mamba2_steps`; arguments as there."""
    (B, H, P, N), (_, L, G, _), T, wide = held.state.shape, held.x.shape, zxbcdt.shape[1], held.state.dtype
    z, raw, dt = zxbcdt.split([H * P, held.raw.shape[2], H], -1)
    conv = ring(raw.to(wide), weights.conv, weights.conv_bias, "silu" if weights.silu else None, held.raw, at.length, at.new)
    x, b, c = conv.split([G * P, G * N, H * N], -1)
    b, c = b.unflatten(-1, (G, N)), c.unflatten(-1, (H, N))
    if angles is not None:
        b, c = (turned(heads, *(part.to(wide) for part in angles)) for heads in (b, c))
    put(held, at, x.unflatten(-1, (G, P)), b, dt)
    places = at.folded[:, None] + torch.arange(L, device=z.device)  # [B, L] positions behind the state
    kept = _replayed(held, at, places < at.length[:, None], weights)
    folded = _replayed(held, at, places < torch.minimum(at.length, at.fold_to)[:, None], weights)
    rows, state, out = torch.arange(B, device=z.device), kept, zxbcdt.new_zeros(B, T, H * P)
    for t in range(T):
        position, alive = at.length + t, at.new > t
        x_t, b_t, dt_t = (buffer[rows, position % L].to(wide) for buffer in (held.x, held.b, held.dt))
        state = torch.where(alive[:, None, None, None], _advance(state, x_t, b_t, dt_t, weights), state)
        folded = torch.where((alive & (position + 1 == at.fold_to))[:, None, None, None], state, folded)
        y = _output(state, x_t, c[:, t], z[:, t].to(wide).unflatten(-1, (H, P)), weights)
        out[:, t] = y.flatten(1).masked_fill(~alive[:, None], 0)
    held.state.copy_(folded)
    return out


def _replayed(held: Any, at: Any, real: Tensor, weights: Any) -> Tensor:
    """The state after those of the L tokens behind it that are `real` [B, L]: their writes, each with the decays that follow it."""
    L, share, wide = real.shape[1], held.state.shape[1] // held.x.shape[2], held.state.dtype
    slots = (at.folded[:, None] + torch.arange(L, device=real.device)) % L
    rows = torch.arange(len(slots), device=real.device)[:, None]
    x, b, dt = (buffer[rows, slots].to(wide) for buffer in (held.x, held.b, held.dt))
    decay, strength = _decay(dt, weights)  # [B, L, H]
    decay = decay.masked_fill(~real[..., None], 0)
    later = torch.nn.functional.pad(decay[:, 1:].flip(1).cumsum(1).flip(1), (0, 0, 0, 1))  # of the tokens behind each
    x = x.repeat_interleave(share, 2) * (later.exp() if strength is None else later.exp() * strength)[..., None]
    x, b = (value.masked_fill(~real[..., None, None], 0) for value in (x, b.repeat_interleave(share, 2)))
    return held.state * decay.sum(1).exp()[..., None, None] + torch.einsum("blhp,blhn->bhpn", x, b)


def put(held: Any, at: Any, *values: Tensor) -> None:
    """Put x [B, T, G, P], b [B, T, G, N] and dt [B, T, H] of the new tokens into their slots."""
    (B, T), L = values[0].shape[:2], held.x.shape[1]
    rows, steps = torch.arange(B, device=at.length.device)[:, None], torch.arange(T, device=at.length.device)
    slots, real = (at.length[:, None] + steps) % L, steps < at.new[:, None]
    for buffer, value in zip((held.x, held.b, held.dt), values, strict=True):
        there = real.view(B, T, *[1] * (value.ndim - 2))
        buffer[rows, slots] = torch.where(there, value.to(buffer.dtype), buffer[rows, slots])


def _decay(dt: Tensor, weights: Any) -> tuple[Tensor, Tensor | None]:
    """Log decay and write strength (None: 1) of steps [..., H]."""
    step = softplus(dt + weights.dt_bias)
    return (-step, None) if weights.A_log is None else (-weights.A_log.to(step.dtype).exp() * step, step)


def _advance(state: Tensor, x: Tensor, b: Tensor, dt: Tensor, weights: Any) -> Tensor:
    """The state [B, H, P, N] after a token x [B, G, P], b [B, G, N], dt [B, H]."""
    (decay, strength), share = _decay(dt, weights), state.shape[1] // x.shape[1]
    write = x.repeat_interleave(share, 1) * (1 if strength is None else strength[..., None])  # [B, H, P]
    return state * decay.exp()[..., None, None] + write[..., None] * b.repeat_interleave(share, 1)[:, :, None]


def _output(state: Tensor, x: Tensor, c: Tensor, z: Tensor, weights: Any) -> Tensor:
    """The gated, normalised output [B, H, P]."""
    y = (state * c[:, :, None]).sum(-1) + weights.D[:, None] * x.repeat_interleave(state.shape[1] // x.shape[1], 1)
    gated = y * silu(z)
    if weights.norm is None:
        return gated
    return gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + weights.eps) * weights.norm.view(gated.shape[1:])
