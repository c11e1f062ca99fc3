"""Attention of a few new tokens to a cache with one slot for each position; positions are on the device.

`place` turns queries and keys by their angles and stores keys and values; `attend` reads, of every row, the slots that its tokens see and
no others, split among programs so that the whole device reads (as flash-decoding does). Query heads of a group share what is read.
Shapes: B batch, T time, H query heads, G key/value heads, R = H // G, P head width, S slots. The token at position p stands in slot p.
"""

import torch
from torch import Tensor

from ..choice import choose, product_obstacle
from ..common import check_rank, check_shape

__all__ = ["attend", "place"]


def place(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keys: Tensor, values: Tensor, impl: str = "auto"
) -> Tensor:
    """Store k and v [B, T, G, P] in keys and values [B, S, G, P] at positions [B, T]; returns q [B, T, H, P], turned.

    q and k are turned by the angles of their positions, cos and sin [S, P] (Su et al. 2021, halves as in Llama).
    Raises `ValueError` for shapes that do not fit, and for an `impl` that is unknown or cannot run here.
    """
    check_rank("q", q, "BTHP")
    (B, T, _, P), (S, G) = q.shape, keys.shape[1:3]
    for name, tensor, shape in (("k", k, (B, T, G, P)), ("v", v, (B, T, G, P)), ("cos", cos, (S, P)), ("sin", sin, (S, P))):
        check_shape(name, tensor, *shape)
    check_shape("values", values, *keys.shape)
    if choose("place", impl, ("torch", "triton"), q) == "triton":
        from .triton_op import fused_place

        return fused_place(q, k, v, cos, sin, positions, keys, values)
    angles = cos[positions][:, :, None], sin[positions][:, :, None]  # [B, T, 1, P]
    rows = torch.arange(B, device=q.device)[:, None]
    keys[rows, positions], values[rows, positions] = _turned(k, *angles).to(keys.dtype), v.to(values.dtype)
    return _turned(q, *angles)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float, window: int | None = None, impl: str = "auto"
) -> Tensor:
    """softmax(scale q k) v over the slots up to each token's position, the last `window` of them: [B, T, H, P].

    q [B, T, H, P]; keys and values [B, S, G, P]; positions [B, T], one after the other in each row. Raises `ValueError` as `place`.
    """
    (B, T, H, P), (S, G) = q.shape, keys.shape[1:3]
    check_shape("positions", positions, B, T)
    check_shape("values", values, *keys.shape)
    if choose("attend", impl, ("torch", "triton"), q, product_obstacle(q, keys, values)) == "triton":
        from .triton_op import fused_attend

        return fused_attend(q, keys, values, positions, scale, window)
    slots, at = torch.arange(S, device=q.device), positions[:, :, None]
    seen = slots <= at if window is None else (slots <= at) & (slots > at - window)  # [B, T, S]
    together = q.unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4).reshape(B, G, -1, P)  # [B, G, R T, P]
    mask = seen[:, None].repeat(1, 1, H // G, 1)
    y = torch.nn.functional.scaled_dot_product_attention(
        together, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return y.unflatten(2, (-1, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
