"""A few queries over keys and values in slots.

Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, S slots.
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend_slots(q: Tensor, keys: Tensor, values: Tensor, added: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k + added) v: q [B, T, H, P], keys and values [B, G, S, P], added [B or 1, T, S] -> [B, T, H, P].

    The queries of a group stand one behind the other, as they read the same slots.
    """
    (B, T, H, P), G = q.shape, keys.shape[1]
    if T == 1:
        mask = None if added is None else added.unsqueeze(1)  # [B or 1, 1, 1, S]
        return scaled_dot_product_attention(q.view(B, G, -1, P), keys, values, mask, scale=scale).view(B, 1, H, P)
    together = q.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, R T, P]
    mask = None if added is None else added[:, None, None].expand(-1, 1, H // G, -1, -1).flatten(2, 3)  # [B or 1, 1, R T, S]
    y = scaled_dot_product_attention(together, keys, values, mask, scale=scale)
    return y.unflatten(2, (-1, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)
