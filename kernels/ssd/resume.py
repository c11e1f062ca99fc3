"""SSD for a few tokens: their outputs in the dual form, without a new state, and their state, without outputs.

Shapes: B batch, S tokens of the sequence, T tokens asked for, H query heads, G key/value heads, R = H // G, P head width, N state width.
"""

import torch
from torch import Tensor

from ..common import accumulator


def resume(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, firsts: Tensor | int, dt: Tensor | None, D: Tensor | None, state: Tensor | None,
    ancestors: Tensor | None,
) -> Tensor:  # fmt: skip
    """y_t = e^{cum_t} S c_t + sum_s e^{cum_t - cum_s} dt_s (b_s . c_t) x_s + D x_t over what t sees; arguments as in `ssd_resume`.

    In a chain t sees all s <= t; in a tree its ancestors, and cum is the sum of the log decays on the path.
    """
    (B, S, G, P), (T, H, N), acc = x.shape, c.shape[1:], accumulator(x.dtype)
    slots = torch.arange(S, device=x.device)
    at = torch.as_tensor(firsts, device=x.device).view(-1, 1) + slots[:T]  # [1 or B, T]
    a = a.to(acc).transpose(1, 2)  # [B, H, S]
    if ancestors is None:
        cum, seen = a.cumsum(-1), slots <= at[..., None]  # [B, H, S], [1 or B, T, S]
    else:
        every = visible(slots, at[:, -1:] + 1 - len(ancestors), ancestors)
        cum, seen = torch.matmul(a, every.mT.to(acc)), every.gather(1, at[..., None].expand(-1, -1, S))
    if isinstance(firsts, int):
        here, own = cum[..., firsts : firsts + T], x[:, firsts : firsts + T]
    else:
        here, own = cum.gather(-1, at[:, None].expand(B, H, T)), x[torch.arange(B, device=x.device)[:, None], at]
    decay = (here[..., None] - cum[:, :, None]).masked_fill_(~seen[:, None], -torch.inf).exp_()  # [B, H, T, S]
    if dt is not None:
        decay = decay.mul_(dt.to(acc).transpose(1, 2)[:, :, None])
    read = c.to(acc).transpose(1, 2)  # [B, H, T, N]
    keys, values = (t.to(acc).transpose(1, 2) for t in (b, x))  # [B, G, S, N], [B, G, S, P]
    scores = torch.matmul(read.reshape(B, G, -1, N), keys.mT).view(B, H, T, S).mul_(decay)
    y = torch.matmul(scores.view(B, G, -1, S), values).view(B, H, T, P)
    if state is not None:
        y = y.addcmul_(torch.matmul(read, state.to(acc).mT), here.exp()[..., None])
    y = y.transpose(1, 2)  # [B, T, H, P]
    if D is not None:
        y = torch.addcmul(y.reshape(B, T, G, -1, P), own.to(acc)[:, :, :, None], D.to(acc).view(G, -1, 1)).view(B, T, H, P)
    return y.to(x.dtype)


def visible(slots: Tensor, roots: Tensor, ancestors: Tensor) -> Tensor:
    """What each slot sees [1 or B, S, S] where the tokens from roots [1 or B, 1] on are the tree of `ancestors` [M, M], a chain before."""
    node = slots - roots  # [1 or B, S]
    inside, near = (node >= 0) & (node < len(ancestors)), node.clamp(0, len(ancestors) - 1)
    among = ancestors[near[:, :, None], near[:, None]]
    return torch.where(inside[:, :, None] & inside[:, None], among, slots <= slots[:, None])


def fold(x: Tensor, a: Tensor, b: Tensor, dt: Tensor | None, state: Tensor | None) -> Tensor:
    """e^{cum_S} state + sum_s e^{cum_S - cum_s} dt_s x_s b_s^T; arguments as in `ssd_fold`."""
    (B, S, G, P), H, acc = x.shape, a.shape[2], accumulator(x.dtype)
    cum = a.to(acc).transpose(1, 2).cumsum(-1)  # [B, H, S]
    strength = (cum[..., -1:] - cum).exp_()
    if dt is not None:
        strength = strength.mul_(dt.to(acc).transpose(1, 2))
    values = x.to(acc).permute(0, 2, 3, 1)[:, :, None] * strength.view(B, G, -1, 1, S)  # [B, G, R, P, S]
    new = torch.matmul(values.flatten(2, 3), b.to(acc).transpose(1, 2)).view(B, H, P, -1)
    return new if state is None else new.addcmul_(state.to(acc), cum[..., -1:, None].exp())
