"""The window and the sinks with one full mask: the oracle.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, S tokens of the past.
"""

import torch
from torch import Tensor

from ..common import accumulator
from .sight import NO_LIMIT, Past, Sight, View, sees


def dense(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float, start: Tensor | None, past: Past | None) -> View:
    """`window_view` of real tokens alone, whose documents start at `start` [B, T] (None: at 0)."""
    place = torch.arange(q.shape[1], device=q.device)[None]  # [1 or B, T]
    if past is not None:
        place = past.length[:, None] + place
    keys, first = place, torch.zeros_like(place) if start is None else start
    if past is not None:
        k, v = torch.cat((past.keys, k), 1), torch.cat((past.values, v), 1)
        keys = torch.cat((past.places.expand(len(place), -1), place), 1)
    k, wide = (heads.repeat_interleave(q.shape[2] // k.shape[2], 2) for heads in (k, v))
    scores = torch.einsum("bihp,bjhp->bhij", q, k).to(accumulator(q.dtype)) * scale
    scores = scores.masked_fill(~sees(place, first, keys, sight)[:, None], -torch.inf)  # [1 or B, H, T, S + T]
    seen = torch.einsum("bhij,bjhp->bihp", scores.softmax(-1).to(q.dtype), wide)
    return View(seen, scores.logsumexp(-1).transpose(1, 2), *_gone(v, sight, place, first, keys, past))


def _gone(v: Tensor, sight: Sight, place: Tensor, first: Tensor, keys: Tensor, past: Past | None) -> tuple[Tensor, Tensor]:
    far = (place[..., None] - keys[:, None] >= sight.window) & (keys[:, None] - first[..., None] >= sight.sinks)
    far = far & (keys[:, None] >= first[..., None]) & (sight.whole < NO_LIMIT)
    sums = torch.einsum("bts,bsgp->btgp", far.expand(len(v), -1, -1).to(v.dtype), v)
    count = far.sum(-1)
    if past is not None and sight.whole < NO_LIMIT:
        sums, count = sums + past.gone[:, None].to(v.dtype), (place - sight.window + 1 - sight.sinks).clamp_min(0)
    return count, sums / count.clamp_min(1)[..., None, None].to(v.dtype)
