"""The decayed products of a block of the delta rule where every key channel has a decay, and their gradient.

Between two tokens of a chunk stands a product of decays that differs from channel to channel, so scores are no products of matrices that
are bounded: exp(sum to i) and exp(-sum to j) overflow. The chunk is halved again and again instead: the later half of a part meets the
earlier one at the border between them, from where both factors are at most 1, however fast the decay. Sums only ever grow from single
tokens, and nothing that was added is subtracted again.
Shapes: K chunks, B batch, Q tokens of a chunk, H query heads, G key/value heads, N state width, m tokens of half a part, S parts.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common import lowest_exponent
from .blocks import Products


class Level(NamedTuple):
    """Log decays from the border in the middle of each part: to the tokens behind it, and from those before it; [K, B, H, S, m, N]."""

    behind: Tensor
    ahead: Tensor


class PerChannel(NamedTuple):
    """Keys b [K, B, G, Q, N], queries c [K, B, H, Q, N], sums of log decays, and who belongs to one document."""

    b: Tensor
    c: Tensor
    levels: list[Level]
    enter: Tensor  # [K, B, H, Q', N] from the start of the chunk to each token, Q' >= Q a power of 2
    leave: Tensor  # [K, B, H, Q', N] from each token to the end of the chunk
    within: Tensor | None  # [K, B, 1, Q, Q] of the documents, and so on
    entered: Tensor | None  # [K, B, 1, Q, 1]
    left: Tensor | None  # [K, B, 1, Q, 1]


def cut(a: Tensor, b: Tensor, c: Tensor, docs: Tensor | None, before: Tensor | None) -> PerChannel:
    """From log decays a [K, B, H, Q, N], document numbers docs [K, B, Q] and those of the states before [K, B]."""
    Q = a.shape[-2]
    rows = 1 << (Q - 1).bit_length()
    enter, leave = (pad(a, (0, 0, 0, rows - Q)), torch.zeros(*a.shape[:-2], rows, a.shape[-1], dtype=a.dtype, device=a.device))
    levels, m = [], 1
    while m < rows:
        to, rest = (t.unflatten(-2, (-1, 2, m)) for t in (enter, leave))  # [K, B, H, S, 2, m, N]
        levels.append(Level(to[..., 1, :, :], rest[..., 0, :, :]))
        earlier, later = to.unbind(-3)
        enter = torch.stack((earlier, later + earlier[..., -1:, :]), -3).flatten(-4, -2)
        earlier, last = rest[..., 0, :, :] + later[..., -1:, :], rest[..., 1, :, :]
        leave = torch.stack((earlier, last), -3).flatten(-4, -2)
        m *= 2
    if docs is None or before is None:
        return PerChannel(b, c, levels, enter, leave, None, None, None)
    same = (docs[..., None] == docs[:, :, None])[:, :, None].to(a.dtype)
    entered, left = ((docs == other[..., None])[:, :, None, :, None].to(a.dtype) for other in (before, docs[..., -1]))
    return PerChannel(b, c, levels, enter, leave, same, entered, left)


def _left(exponent: Tensor) -> Tensor:
    """What a sum of log decays leaves; far down, where results underflow, exp is many times slower."""
    return exponent.clamp_min(lowest_exponent(exponent.dtype)).exp_()


def _halves(block: PerChannel) -> Iterator[tuple[Level, slice, Tensor, Tensor, Tensor]]:
    """Of each level: factors, the places of its parts, and of each part queries and keys behind the border, keys before it."""
    (_, _, H, Q, _), rows = block.c.shape, block.enter.shape[-2]
    keys, queries = (pad(t, (0, 0, 0, rows - Q)) for t in (block.b.repeat_interleave(H // block.b.shape[2], 2), block.c))
    for depth, level in enumerate(block.levels):
        m = 1 << depth
        (_, c), (early, late) = (t.unflatten(-2, (-1, 2, m)).unbind(-3) for t in (queries, keys))
        yield Level(_left(level.behind), _left(level.ahead)), slice(m), c, late, early


def _parts(square: Tensor, m: int) -> Tensor:
    """A view of [K, B, H, Q', Q']: of each part of 2 m tokens the rows of the later half and the columns of the earlier [..., S, m, m]."""
    diagonal = square.unflatten(-1, (-1, 2 * m)).unflatten(-3, (-1, 2 * m)).diagonal(dim1=-4, dim2=-2)  # [..., 2 m, 2 m, S]
    return diagonal[..., m:, :m, :].movedim(-1, -3)


def products(block: PerChannel) -> Products:
    """What `blocks.solve` takes."""
    (K, B, H, Q, _), rows = block.c.shape, block.enter.shape[-2]
    keys = block.b.repeat_interleave(H // block.b.shape[2], 2)
    mixing, overlap = block.c.new_zeros(2, K, B, H, rows, rows).unbind()
    for (behind, ahead), half, c, late, early in _halves(block):
        before = (early * ahead).mT
        _parts(mixing, half.stop).copy_(torch.matmul(c * behind, before))
        _parts(overlap, half.stop).copy_(torch.matmul(late * behind, before))
    mixing, overlap = mixing[..., :Q, :Q], overlap[..., :Q, :Q]
    mixing.diagonal(dim1=-2, dim2=-1).copy_((block.c * keys).sum(-1))
    enter, leave = _left(block.enter[..., :Q, :]), _left(block.leave[..., :Q, :])
    across = _left(block.enter[..., -1, :])
    if block.within is None or block.entered is None or block.left is None:
        return Products(mixing, overlap, block.c * enter, keys * enter, keys * leave, across)
    enter, leave, across = enter * block.entered, leave * block.left, across * block.entered[..., -1, :]
    return Products(mixing * block.within, overlap * block.within, block.c * enter, keys * enter, keys * leave, across)


def gradients(block: PerChannel, made: Products, grads: Products) -> tuple[Tensor, Tensor, Tensor]:
    """Of a [K, B, H, Q, N], b [K, B, G, Q, N] and c [K, B, H, Q, N]."""
    (H, Q), rows, G = block.c.shape[2:4], block.enter.shape[-2], block.b.shape[2]
    wide = (0, 0, 0, rows - Q)
    keys = block.b.repeat_interleave(H // G, 2)
    enter, leave = _left(block.enter[..., :Q, :]), _left(block.leave[..., :Q, :])
    if block.entered is not None and block.left is not None:
        enter, leave = enter * block.entered, leave * block.left
    own = grads.mixing.diagonal(dim1=-2, dim2=-1)[..., None]
    dc, dkeys = grads.read * enter + own * keys, grads.probe * enter + grads.leave * leave + own * block.c
    entering = pad(grads.read * made.read + grads.probe * made.probe, wide)
    entering[..., -1, :] += grads.across * made.across
    leaving = pad(grads.leave * made.leave, wide)
    dc, dkeys = pad(dc, wide), pad(dkeys, wide)
    squares = [t if block.within is None else t * block.within for t in (grads.mixing, grads.overlap)]
    dmixing, doverlap = (pad(t, (0, rows - Q, 0, rows - Q)) for t in squares)
    flows: list[Level] = []
    for (behind, ahead), half, c, late, early in _halves(block):
        queries, latter, before = c * behind, late * behind, early * ahead
        scores, pairs = _parts(dmixing, half.stop), _parts(doverlap, half.stop)
        dqueries, dlatter = torch.matmul(scores, before), torch.matmul(pairs, before)
        dbefore = torch.matmul(scores.mT, queries) + torch.matmul(pairs.mT, latter)
        flows.append(Level(dqueries * queries + dlatter * latter, dbefore * before))
        _, c_part = dc.unflatten(-2, (-1, 2, half.stop)).unbind(-3)
        early_part, late_part = dkeys.unflatten(-2, (-1, 2, half.stop)).unbind(-3)
        c_part.addcmul_(dqueries, behind)
        late_part.addcmul_(dlatter, behind)
        early_part.addcmul_(dbefore, ahead)
    da = _decay_gradient(flows, entering, leaving)[..., :Q, :]
    return da, dkeys[..., :Q, :].unflatten(2, (G, -1)).sum(3), dc[..., :Q, :]


def _decay_gradient(flows: list[Level], enter: Tensor, leave: Tensor) -> Tensor:
    """Of log decays [K, B, H, Q', N], from the flows of every level and those from the start and to the end [K, B, H, Q', N]."""
    for depth in reversed(range(len(flows))):
        m = 1 << depth
        earlier, later = enter.unflatten(-2, (-1, 2, m)).unbind(-3)
        first, last = leave.unflatten(-2, (-1, 2, m)).unbind(-3)
        earlier, later = earlier.clone(), later + flows[depth].behind
        earlier[..., -1, :] += enter.unflatten(-2, (-1, 2, m))[..., 1, :, :].sum(-2)
        later[..., -1, :] += first.sum(-2)
        enter = torch.stack((earlier, later), -3).flatten(-4, -2)
        leave = torch.stack((first + flows[depth].ahead, last), -3).flatten(-4, -2)
    return enter
