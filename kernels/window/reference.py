"""The window and the sinks with one full mask: the oracle.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, S tokens of the past.
"""

import torch
from torch import Tensor

from ..common import accumulator
from .sight import NO_LIMIT, Past, Sight, sees


def dense(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float, start: Tensor | None, past: Past | None) -> tuple[Tensor, Tensor]:
    """What real tokens see, whose documents start at `start` [B, T] (None: at 0): attention, and the logarithm of its denominator."""
    place, first, keys = _places(q, start, past)
    if past is not None:
        k, v = torch.cat((past.keys, k), 1), torch.cat((past.values, v), 1)
    k, v = (heads.repeat_interleave(q.shape[2] // k.shape[2], 2) for heads in (k, v))
    scores = torch.einsum("bihp,bjhp->bhij", q, k).to(accumulator(q.dtype)) * scale
    scores = scores.masked_fill(~sees(place, first, keys, sight)[:, None], -torch.inf)  # [B, H, T, S + T]
    return torch.einsum("bhij,bjhp->bihp", scores.softmax(-1).to(q.dtype), v), scores.logsumexp(-1).transpose(1, 2)


def dense_gone(v: Tensor, sight: Sight, start: Tensor | None, past: Past | None) -> tuple[Tensor, Tensor, Tensor]:
    """`gone`; arguments as there."""
    place, first, keys = _places(v, start, past)
    values = v if past is None else torch.cat((past.values, v), 1)
    back, behind = place[..., None] - keys[:, None], keys[:, None] - first[..., None]
    far = (back >= sight.window) & (behind >= sight.sinks) & (behind >= 0) & (sight.whole < NO_LIMIT)  # [1 or B, T, S + T]
    sums, count = torch.einsum("bts,bsgp->btgp", far.expand(len(v), -1, -1).to(v.dtype), values), far.sum(-1)
    if past is not None and sight.whole < NO_LIMIT:
        sums, count = sums + past.gone[:, None].to(v.dtype), (place - sight.window + 1 - sight.sinks).clamp_min(0)
    some = count.clamp_min(1).to(accumulator(v.dtype))
    return count > 0, some.log(), sums / some[..., None, None].to(v.dtype)


def _places(heads: Tensor, start: Tensor | None, past: Past | None) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the tokens [1 or B, T], of their documents' starts, and of the keys [1 or B, S + T]."""
    place = torch.arange(heads.shape[1], device=heads.device)[None]
    if past is None:
        return place, torch.zeros_like(place) if start is None else start, place
    place = past.length[:, None] + place
    return place, torch.zeros_like(place), torch.cat((past.places.expand(len(place), -1), place), 1)
