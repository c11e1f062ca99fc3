"""A few queries over keys and values in slots.

Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, S slots.
"""

import torch
from torch import Tensor

from ..common import accumulator


def attend_slots(q: Tensor, keys: Tensor, values: Tensor, added: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k + added) v and the logarithm of its denominator: q [B, T, H, P], keys and values [B, G, S, P], added
    [B or 1, T, S] -> [B, T, H, P] and [B, T, H], the latter at least fp32.

    The queries of a group stand one behind the other, as they read the same slots.
    """
    T, G, R, wide = q.shape[1], keys.shape[1], q.shape[2] // keys.shape[1], accumulator(q.dtype)
    together = q.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, R T, P]
    scores = (together.to(wide) * scale) @ keys.to(wide).transpose(-1, -2)  # [B, G, R T, S]
    if added is not None:
        scores = scores + added.repeat(1, R, 1)[:, None]
    weights, lse = _softmax(scores)
    y = (weights.to(values.dtype) @ values).unflatten(2, (R, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return y, lse.unflatten(2, (R, T)).permute(0, 3, 1, 2).flatten(2, 3)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attend_slots` where `seen` [B or 1, T, S] says so: q [B, T, H, P], k and v [B, S, G, P]."""
    added = torch.zeros(seen.shape, dtype=accumulator(q.dtype), device=q.device).masked_fill_(~seen, -torch.inf)
    return attend_slots(q, k.transpose(1, 2), v.transpose(1, 2), added, scale)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Along the last dimension, and the logarithm of its denominator, which follows from the largest of both."""
    weights = scores.softmax(-1)
    return weights, scores.amax(-1) - weights.amax(-1).log()
