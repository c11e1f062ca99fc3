"""Tokens of a Mamba-2 mixer between its projections, all at once: the dual, attention-like form, for chains and for trees.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, W conv width, C channels, L slots.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from ..conv1d import causal_conv1d_span
from ..ssd import ssd_resume
from .rounds import Buffers, Cursors


class Branches(NamedTuple):
    """The T tokens of a round as a tree: node 0 follows the tokens that are kept. See `llamba.models.tree.Tree`, which makes both."""

    ancestors: Tensor  # [T, T] bool, whether node j is node i or stands on the way to it; j <= i
    windows: Tensor  # [T, W] integers, what the convolution of each node sees, oldest first: W - 1 + j is node j, less is before node 0


def keep_paths(held: Buffers, at: Cursors, paths: Tensor) -> None:
    """Bring a path of each row's tree to the front, before `commit`: token j takes the place of node paths[b, j] >= j.

    paths [B, J] integers on the device; what stands behind a shorter path, padded with any node, is not to be kept. Only device work.
    """
    rows, places = torch.arange(len(paths), device=paths.device)[:, None], torch.arange(paths.shape[1], device=paths.device)
    for ring in held[1:]:
        to, start = (at.length[:, None] + places) % ring.shape[1], (at.length[:, None] + paths) % ring.shape[1]
        ring[rows, to] = ring[rows, start]


def dual_in_torch(zxbcdt: Tensor, weights: Any, held: Any, at: Any, branches: Any) -> Tensor:
    """`mamba2_steps` with form="dual"; arguments as there."""
    (B, H, P, N), (_, L, G, _), T, wide = held.state.shape, held.x.shape, zxbcdt.shape[1], held.state.dtype
    gate, fresh, dt = zxbcdt.split([H * P, held.raw.shape[2], H], -1)
    x, b, c = _convolve(fresh, weights, held, at, branches).split([G * P, G * N, H * N], -1)
    real = torch.arange(T, device=zxbcdt.device) < at.new[:, None]  # [B, T]
    for ring, values in ((held.raw, fresh), (held.x, x.unflatten(-1, (G, P))), (held.b, b.unflatten(-1, (G, N))), (held.dt, dt)):
        _append(ring, values, at.length, real)
    slots = torch.arange(L, device=zxbcdt.device)
    kept = slots < (at.length + at.new - at.folded)[:, None]  # [B, L] in order, from the token behind the state
    rows, order = torch.arange(B, device=zxbcdt.device)[:, None], (at.folded[:, None] + slots) % L
    x, b, dt = (_absent(ring[rows, order].to(wide), kept) for ring in (held.x, held.b, held.dt))
    a, strength = rates(dt, weights)
    y = ssd_resume(
        x, a, b, c.unflatten(-1, (H, N)), firsts=(at.length - at.folded).long(), dt=strength, D=weights.D, state=held.state,
        ancestors=None if branches is None else branches.ancestors,
    )  # fmt: skip
    _fold(x, a, b, strength, held.state, at, slots < (at.fold_to - at.folded)[:, None])
    return _absent(_output(y, gate.to(wide), weights), real).to(zxbcdt.dtype)


def _absent(values: Tensor, there: Tensor) -> Tensor:
    """values [B, T, ...] with 0 where there [B, T] is False, whatever stood there."""
    return values.masked_fill(~there.view(*there.shape, *[1] * (values.ndim - 2)), 0)


def _convolve(fresh: Tensor, weights: Any, held: Any, at: Any, branches: Any) -> Tensor:
    """The convolution's output [B, T, C] in the state's format; fresh [B, T, C]."""
    R, W, wide = held.raw.shape[1], weights.conv.shape[1], held.state.dtype
    places = at.length[:, None] + torch.arange(1 - W, 0, device=fresh.device)  # [B, W - 1]
    before = _absent(held.raw[torch.arange(len(fresh), device=fresh.device)[:, None], places % R], places >= 0)
    return causal_conv1d_span(
        torch.cat((before, fresh), 1).to(wide), weights.conv, weights.conv_bias, activation="silu" if weights.silu else None,
        windows=None if branches is None else branches.windows,
    )  # fmt: skip


def _append(ring: Tensor, values: Tensor, length: Tensor, real: Tensor) -> None:
    """Put values [B, T, ...] into the slots from length[b] on where real [B, T]."""
    rows, places = torch.arange(len(ring), device=ring.device)[:, None], length[:, None] + torch.arange(real.shape[1], device=ring.device)
    at = places % ring.shape[1]
    chosen = real.view(*real.shape, *[1] * (ring.ndim - 2))
    ring[rows, at] = torch.where(chosen, values.to(ring.dtype), ring[rows, at])


def rates(dt: Tensor, weights: Any) -> tuple[Tensor, Tensor | None]:
    """Log decay and write strength (None: 1), both [..., H], from the raw steps."""
    step = softplus(dt + weights.dt_bias)
    return (-step, None) if weights.A_log is None else (-weights.A_log.to(step.dtype).exp() * step, step)


def _fold(x: Tensor, a: Tensor, b: Tensor, strength: Tensor | None, state: Tensor, at: Any, gone: Tensor) -> None:
    """Advance the state over the tokens where gone [B, L], a run from the first on, in rows that have any."""
    a = _absent(a, gone)
    left = (a.flip(1).cumsum(1).flip(1) - a).clamp_max(0).exp()  # [B, L, H] from a token to the new state
    write = _absent(left if strength is None else left * strength, gone)
    share = state.shape[1] // x.shape[2]
    x, b = x.repeat_interleave(share, 2) * write[..., None], b.repeat_interleave(share, 2)
    after = state * a.sum(1).exp()[..., None, None] + torch.einsum("blhp,blhn->bhpn", x, b)
    state.copy_(torch.where((at.fold_to > at.folded)[:, None, None, None], after, state))


def _output(y: Tensor, gate: Tensor, weights: Any) -> Tensor:
    """The gated, normalised output [B, T, H P] of y [B, T, H, P]."""
    gated = y * silu(gate).view(y.shape)
    if weights.norm is not None:
        gated = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + weights.eps) * weights.norm.view(gated.shape[2:])
    return gated.flatten(-2)
