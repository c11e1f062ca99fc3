"""A few queries over keys and values in slots.

Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, S slots.
"""

import torch
from torch import Tensor

from ..common import accumulator, no_autocast, traced

Seen = tuple[Tensor, Tensor]  # attention, and the logarithm of its denominator (at least fp32)


def attend_slots(q: Tensor, keys: Tensor, values: Tensor, added: Tensor | None, scale: float) -> Seen:
    """softmax(scale q k + added) v and the logarithm of its denominator: q [B, T, H, P], keys and values [B, G, S, P], added
    [B or 1, T, S] -> [B, T, H, P] and [B, T, H].

    The queries of a group stand one behind the other, as they read the same slots.
    """
    (B, T, H, P), G = q.shape, keys.shape[1]
    in_one = q.device.type == "cpu" and not torch.is_grad_enabled() and not traced(T)
    form, R = _in_one if in_one else _written_out, H // G
    if T == 1:
        y, lse = form(q.reshape(B, G, R, P), keys, values, None if added is None else added.unsqueeze(1), scale)
        return y.reshape(B, 1, H, P), lse.reshape(B, 1, H)
    together = q.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, R T, P]
    mask = None if added is None else added.repeat(1, R, 1)[:, None]  # [B or 1, 1, R T, S]
    y, lse = form(together, keys, values, mask, scale)
    return y.unflatten(2, (R, T)).permute(0, 3, 1, 2, 4).flatten(2, 3), lse.unflatten(2, (R, T)).permute(0, 3, 1, 2).flatten(2, 3)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Seen:
    """`attend_slots` where `seen` [B or 1, T, S] says so: q [B, T, H, P], k and v [B, S, G, P]."""
    added = torch.zeros(seen.shape, dtype=accumulator(q.dtype), device=q.device).masked_fill_(~seen, -torch.inf)
    return attend_slots(q, k.transpose(1, 2), v.transpose(1, 2), added, scale)


def _in_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Seen:
    """PyTorch's own attention for CPUs, which returns the logarithm but has no gradient of it."""
    mask = None if mask is None else mask.to(q.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Seen:
    wide = accumulator(q.dtype)
    with no_autocast(q):
        scores = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)  # [B, G, R T, S]
        scores = scores if mask is None else scores + mask
        weights = scores.softmax(-1)
        return weights.to(v.dtype) @ v, scores.amax(-1) - weights.amax(-1).log()  # of the largest: score = log of weight and denominator
