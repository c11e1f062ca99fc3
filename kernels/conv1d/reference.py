"""The causal convolution one token at a time: the oracle of the faster form.

Shapes: B batch, T time, C channels, W conv width.
"""

import torch
from torch import Tensor

from ..common import accumulator


def sequential(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor,
    seq_idx: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` with a given state, moving the window of each row forward at its real tokens; shapes as there."""
    (B, T, _), acc = x.shape, accumulator(x.dtype)
    docs = torch.zeros(B, T, dtype=torch.long, device=x.device) if seq_idx is None else seq_idx
    real = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask
    window, current, ys = state.to(acc), torch.zeros_like(docs[:, 0]), []
    for t in range(T):
        fresh = (real[:, t] & (docs[:, t] != current))[:, None, None]
        full = torch.cat([window.masked_fill(fresh, 0), x[:, t, None].to(acc)], 1)  # [B, W, C]
        y = (full * weight.to(acc).t()).sum(1)
        y = y if bias is None else y + bias.to(acc)
        ys.append((torch.nn.functional.silu(y) if activation == "silu" else y) * real[:, t, None])
        window = torch.where(real[:, t, None, None], full[:, 1:], window)
        current = torch.where(real[:, t], docs[:, t], current)
    return torch.stack(ys, 1).to(x.dtype), window.to(x.dtype)
