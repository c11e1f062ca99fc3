"""The decayed products of a block of the delta rule where a head has one decay, and their gradient.

Shapes: K chunks, B batch, Q tokens of a chunk, H query heads, G key/value heads, R = H // G, N state width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ssd.decay import Decay, decays
from .blocks import Products


class PerHead(NamedTuple):
    """Keys b [K, B, G, Q, N], queries c [K, B, H, Q, N] and the decays between them."""

    b: Tensor
    c: Tensor
    decay: Decay


def cut(a: Tensor, b: Tensor, c: Tensor, docs: Tensor | None, before: Tensor | None) -> PerHead:
    """From log decays a [K, B, H, Q], document numbers docs [K, B, Q] and those of the states before [K, B]."""
    return PerHead(b, c, decays(a, docs, before))


def products(block: PerHead) -> Products:
    """What `blocks.solve` takes."""
    b, c, decay = block
    (K, B, H, Q, N), G = c.shape, b.shape[2]
    mixing = torch.matmul(c.view(K, B, G, -1, N), b.mT).view(K, B, H, Q, Q).mul_(decay.within)
    overlap = torch.matmul(b, b.mT)[:, :, :, None] * decay.within.view(K, B, G, -1, Q, Q)
    keys = b.repeat_interleave(H // G, 2)
    enter, leave = decay.enter[..., None], decay.leave[..., None]
    return Products(mixing, overlap.view(K, B, H, Q, Q).tril_(-1), c * enter, keys * enter, keys * leave, decay.across[..., None])


def gradients(block: PerHead, made: Products, grads: Products) -> tuple[Tensor, Tensor, Tensor]:
    """Of a [K, B, H, Q], b [K, B, G, Q, N] and c [K, B, H, Q, N]; `grads` is used up."""
    b, c, decay = block
    (K, B, _, Q, N), G = c.shape, b.shape[2]
    enter, leave = decay.enter[..., None], decay.leave[..., None]
    flow = torch.addcmul(grads.mixing * made.mixing, grads.overlap, made.overlap)  # [K, B, H, Q, Q] from token j to token i
    entering = (grads.read * made.read).add_(grads.probe * made.probe).sum(-1)
    leaving = (grads.leave * made.leave).sum(-1)
    da = decay_gradient(flow, entering, leaving, (grads.across * made.across).squeeze(-1))
    dscores = grads.mixing.mul_(decay.within).view(K, B, G, -1, Q)  # [K, B, G, R Q, Q]
    dkeys = grads.overlap.mul_(decay.within).tril_(-1).view(K, B, G, -1, Q, Q).sum(3)  # [K, B, G, Q, Q]
    dc = grads.read.mul_(enter).add_(torch.matmul(dscores, b).view_as(c))
    db = grads.probe.mul_(enter).add_(grads.leave.mul_(leave)).view(K, B, G, -1, Q, N).sum(3)
    db.add_(torch.matmul(dscores.mT, c.view(K, B, G, -1, N))).add_(torch.matmul(dkeys + dkeys.mT, b))
    return da, db, dc


def decay_gradient(flow: Tensor, enter: Tensor, leave: Tensor, across: Tensor) -> Tensor:
    """Of log decays [K, B, H, Q], from what flows from token j to token i [K, B, H, Q, Q], in from the state before, out, and across.

    That of a_k is the sum of the flows from before k to k and after; nothing that was added is subtracted again.
    """
    Q = flow.shape[-1]
    after = torch.ones(Q, Q, dtype=flow.dtype, device=flow.device).triu_()  # [k, i], 1 for i >= k
    da = torch.matmul(after, flow).tril_(-1).sum(-1)
    da[..., 1:] += leave.cumsum(-1)[..., :-1]
    return da.add_(enter.flip(-1).cumsum(-1).flip(-1)).add_(across[..., None])
