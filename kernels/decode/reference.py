"""Tokens of a Mamba-2 mixer between its projections, one after another: the CPU's form.

Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, N state width, W conv width, C channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def steps_in_torch(zxbcdt: Tensor, weights: Any, held: Any, at: Any) -> Tensor:
    """`mamba2_steps`; arguments as there."""
    (B, H, P, _), out = held.state.shape, zxbcdt.new_zeros(*zxbcdt.shape[:2], held.state.shape[1] * held.state.shape[2])
    for row in range(B):
        length, folded, new, fold_to = (int(cursor[row]) for cursor in at)
        state = held.state[row]
        for position in range(folded, length + new):
            if position >= length:
                token = zxbcdt[row, position - length]
                c = _take(token, weights, held, row, position)
            x, b, dt = (ring[row, position % held.x.shape[1]].to(state.dtype) for ring in (held.x, held.b, held.dt))
            state = _advance(state, x, b, dt, weights)
            if position >= length:
                y = _output(state, x, c, token[: H * P].to(state.dtype).view(H, P), weights)
                out[row, position - length] = y.flatten()
            if position + 1 == fold_to:
                held.state[row] = state
    return out


def _take(token: Tensor, weights: Any, held: Any, row: int, position: int) -> Tensor:
    """Put a token into its slots; returns C [H, N]."""
    _, H, P, N = held.state.shape
    G, (C, W), wide = held.x.shape[2], weights.conv.shape, held.state.dtype
    held.raw[row, position % held.raw.shape[1]] = token[H * P : H * P + C]
    places = torch.arange(position - W + 1, position + 1, device=token.device)
    window = held.raw[row, places % held.raw.shape[1]].to(wide).masked_fill((places < 0)[:, None], 0)  # [W, C]
    z = (window * weights.conv.t().to(wide)).sum(0)
    z = z if weights.conv_bias is None else z + weights.conv_bias.to(wide)
    x, b, c = (silu(z) if weights.silu else z).split([G * P, G * N, H * N])
    slot = position % held.x.shape[1]
    held.x[row, slot], held.b[row, slot], held.dt[row, slot] = x.view(G, P), b.view(G, N), token[-H:]
    return c.view(H, N)


def _advance(state: Tensor, x: Tensor, b: Tensor, dt: Tensor, weights: Any) -> Tensor:
    """The state [H, P, N] after a token x [G, P], b [G, N], dt [H]."""
    step, share = softplus(dt + weights.dt_bias), state.shape[0] // x.shape[0]
    decay = (-step if weights.A_log is None else -weights.A_log.to(step.dtype).exp() * step).exp()
    write = x.repeat_interleave(share, 0) * (1 if weights.A_log is None else step[:, None])  # [H, P]
    return state * decay[:, None, None] + write[:, :, None] * b.repeat_interleave(share, 0)[:, None]


def _output(state: Tensor, x: Tensor, c: Tensor, z: Tensor, weights: Any) -> Tensor:
    """The gated, normalised output [H, P]."""
    y = (state * c[:, None]).sum(-1) + weights.D[:, None] * x.repeat_interleave(state.shape[0] // x.shape[0], 0)
    gated = y * silu(z)
    if weights.norm is None:
        return gated
    return gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + weights.eps) * weights.norm.view(gated.shape)
