"""A few queries over keys and values in slots.

Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, S slots.
"""

import torch
from torch import Tensor


def attend_slots(q: Tensor, keys: Tensor, values: Tensor, added: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k + added) v: q [B, T, H, P], keys and values [B, G, S, P], added [B or 1, T, S] -> [B, T, H, P].

    Three calls where T is 1: at this size each call costs more than its arithmetic.
    """
    (B, T, H, P), (G, S) = q.shape, keys.shape[1:3]
    R = H // G
    together = q.reshape(B * G, R, P) if T == 1 else q.reshape(B, T, G, R, P).permute(0, 2, 3, 1, 4).reshape(B * G, R * T, P)
    scores = torch.baddbmm(q.new_empty(()), together, keys.view(B * G, S, P).transpose(1, 2), beta=0, alpha=scale)  # [B G, R T, S]
    if added is not None:
        scores = (scores.view(B, G, R, T, S) + added[:, None, None]).view(B * G, R * T, S)
    y = torch.bmm(scores.softmax(-1), values.view(B * G, S, P))
    return y.view(B, 1, H, P) if T == 1 else y.view(B, G, R, T, P).permute(0, 3, 1, 2, 4).reshape(B, T, H, P)
