"""The gradient of one block of the chunked SSD, from its inputs alone.

Shapes: K chunks, B batch, Q tokens of a chunk, H query heads, G key/value heads, R = H // G, P head width, N state width;
Z = K * B * G, the batch of the grouped matrix products.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Block, add_skip, carry, per_group, per_key, scores, weighted_values


class Gradients(NamedTuple):
    """Gradients of a block's inputs and of the state before it."""

    x: Tensor  # [K, B, G, Q, P]
    a: Tensor  # [K, B, H, Q]
    b: Tensor  # [K, B, G, Q, N]
    c: Tensor  # [K, B, H, Q, N]
    dt: Tensor | None  # [K, B, H, Q]
    D: Tensor | None  # [H]
    state: Tensor  # [B, H, P, N]


class Between(NamedTuple):
    """Gradients through the states, and the flows that the decays answer for."""

    x: Tensor  # [Z, Q, P]
    b: Tensor  # [Z, Q, N]
    c: Tensor  # [K, B, H, Q, N]
    enter: Tensor  # [K, B, H, Q] flow from the state before the chunk to token i
    leave: Tensor  # [K, B, H, Q] gradient of the strength of token j
    across: Tensor  # [K, B, H] flow from the state before the chunk to the one after it
    state: Tensor  # [B, H, P, N]


def block_backward(block: Block, D: Tensor | None, state: Tensor, dy: Tensor, dlast: Tensor) -> Gradients:
    """Gradients from those of the outputs dy [K, B, H, Q, P] and of the state after the block dlast [B, H, P, N]."""
    far, G = _between(block, state, dy, dlast), block.x.shape[2]
    dmixing = torch.bmm(per_group(dy, G), per_key(block.x).transpose(1, 2)).view(block.decay.within.shape)
    dD = None if D is None else dmixing.diagonal(dim1=-2, dim2=-1).sum((0, 1, 3))
    bare = scores(block)
    da, ddt = _decay_gradients(block, far, dmixing * bare)
    mixing = bare if block.dt is None else bare.mul_(block.dt[..., None, :])
    dx = far.x.baddbmm_(per_group(add_skip(mixing, D), G).transpose(1, 2), per_group(dy, G))
    dscores = dmixing.mul_(block.decay.within)
    if block.dt is not None:
        dscores.mul_(block.dt[..., None, :])
    dc = per_group(far.c, G).baddbmm_(per_group(dscores, G), per_key(block.b))
    db = far.b.baddbmm_(per_group(dscores, G).transpose(1, 2), per_group(block.c, G))
    return Gradients(dx.view_as(block.x), da, db.view_as(block.b), dc.view_as(block.c), ddt, dD, far.state)


def _between(block: Block, state: Tensor, dy: Tensor, dlast: Tensor) -> Between:
    values = weighted_values(block)
    states, dstates = carry(block, values, state)[:-1], _carry_back(block, dy, dlast)
    dc = torch.matmul(dy, states).mul_(block.decay.enter[..., None])
    enter = (dc * block.c).sum(-1)
    across = states.mul_(dstates[1:]).sum((-1, -2)).mul_(block.decay.across)
    rows = dstates[1:].view(len(values), -1, states.shape[-1])  # [Z, R * P, N]
    dx, leave = _value_gradients(block, torch.bmm(per_key(block.b), rows.transpose(1, 2)))
    return Between(dx, torch.bmm(values, rows), dc, enter, leave, across, dstates[0])


def _value_gradients(block: Block, pull: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [Z, Q, P] and of the strength [K, B, H, Q], from those of the weighted values [Z, Q, R * P]."""
    K, B, G, Q, P = block.x.shape
    by_head = pull.view(K, B, G, Q, -1, P).transpose(3, 4)  # [K, B, G, R, Q, P]
    leave = (by_head * block.x[:, :, :, None]).sum(-1)
    weight = block.strength.view(*leave.shape, 1)
    return by_head.mul_(weight).sum(3).flatten(0, 2), leave.flatten(2, 3)


def _carry_back(block: Block, dy: Tensor, dlast: Tensor) -> Tensor:
    """Gradients of the states before each chunk and after the last, [K + 1, B, H, P, N]."""
    reach = torch.matmul((dy * block.decay.enter[..., None]).transpose(-1, -2), block.c)  # [K, B, H, P, N]
    dstates = torch.empty(len(reach) + 1, *dlast.shape, dtype=reach.dtype, device=reach.device)
    dstates[-1] = dlast
    across = block.decay.across[..., None, None]
    for k in reversed(range(len(reach))):
        torch.mul(dstates[k + 1], across[k], out=dstates[k]).add_(reach[k])
    return dstates


def _decay_gradients(block: Block, far: Between, flow: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of a and dt [K, B, H, Q] from the flow [K, B, H, Q, Q] from token j to token i, without dt_j.

    That of a_k is the sum of the flows from before k to k and after. Nothing that was added is subtracted again, so a decay
    that lets nothing pass gets no rounding noise.
    """
    Q = flow.shape[-1]
    after = torch.ones(Q, Q, dtype=flow.dtype, device=flow.device).triu_()  # [k, i], 1 for i >= k
    reached = torch.matmul(after, flow)  # [K, B, H, Q, Q]: flow from j to k and after
    ddt = None if block.dt is None else torch.addcmul(reached[..., 0, :], far.leave, block.decay.leave)
    dt = torch.ones_like(far.leave) if block.dt is None else block.dt
    da = torch.matmul(reached.tril_(-1), dt[..., None]).squeeze(-1)
    leaving = (far.leave * block.strength).cumsum(-1)
    da[..., 1:] += leaving[..., :-1]
    return da.add_(far.enter.flip(-1).cumsum(-1).flip(-1)).add_(far.across[..., None]), ddt
