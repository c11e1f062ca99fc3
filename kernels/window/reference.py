"""The window and the sinks with one full mask: the oracle.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, S tokens of the past.
"""

import torch
from torch import Tensor

from .sight import Past, Sight, sees


def dense(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float, start: Tensor | None, past: Past | None) -> Tensor:
    """`window_attention` of real tokens alone, whose documents start at `start` [B, T] (None: at 0)."""
    place = torch.arange(q.shape[1], device=q.device)[None]  # [1 or B, T]
    if past is not None:
        place = past.length[:, None] + place
    keys = place
    if past is not None:
        k, v = torch.cat((past.keys, k), 1), torch.cat((past.values, v), 1)
        keys = torch.cat((past.places.expand(len(place), -1), place), 1)
    seen = sees(place, torch.zeros_like(place) if start is None else start, keys, sight)  # [1 or B, T, S + T]
    k, v = (heads.repeat_interleave(q.shape[2] // k.shape[2], 2) for heads in (k, v))
    scores = torch.einsum("bihp,bjhp->bhij", q, k) * scale
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhp->bihp", weights, v)
