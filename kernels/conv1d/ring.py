"""A few tokens of the convolution behind a ring of raw inputs, whose cursors stay on the device.

Shapes: B batch, T time, C channels, W conv width, R slots of the ring.
"""

import torch
from torch import Tensor

from ..common import accumulator


def ring(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, slots: Tensor, length: Tensor, new: Tensor) -> Tensor:
    """`causal_conv1d_ring`; shapes as there."""
    (_, T, _), (R, W), acc = x.shape, (slots.shape[1], weight.shape[1]), accumulator(x.dtype)
    rows, steps = torch.arange(len(x), device=x.device)[:, None], torch.arange(T, device=x.device)
    places = length[:, None] + torch.arange(1 - W, 0, device=x.device)  # [B, W - 1] positions before the new tokens
    window = slots[rows, places % R].masked_fill((places < 0)[..., None], 0)
    span = torch.cat([window, x], 1).unfold(1, W, 1)  # [B, T, C, W]
    y = (span.to(acc) * weight.to(acc)).sum(-1)
    y = y if bias is None else y + bias.to(acc)
    real = steps < new[:, None]
    at = (length[:, None] + steps) % R
    slots[rows, at] = torch.where(real[..., None], x.to(slots.dtype), slots[rows, at])
    return (y if activation is None else torch.nn.functional.silu(y)).masked_fill(~real[..., None], 0).to(x.dtype)
