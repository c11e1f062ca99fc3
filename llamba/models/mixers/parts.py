"""What mixers are made of beside their recurrence: norms over heads, and a convolution that looks back alone.

Shapes: H heads, P head width, C channels, W convolution width; leading dimensions are free.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llamba.kernels.gated_norm import gated_head_norm


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class QKNorm(nn.Module):
    """The teacher's norm over each query or key head: RMSNorm ("rms") or LayerNorm ("layer"), in at least fp32."""

    def __init__(self, kind: str, width: int, eps: float):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layer" else None

    def forward(self, heads: Tensor) -> Tensor:  # [..., P]
        wide = at_least_fp32(heads)
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return (wide if self.bias is None else wide + self.bias).to(heads.dtype)


class GatedHeadNorm(nn.Module):
    """Gate, then RMSNorm over each head; see `llamba.kernels.gated_norm`."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:  # [..., H, P], [..., H P]
        return gated_head_norm(y, z, self.weight, self.eps)


class CausalConv(nn.Module):
    """The weights of a mixer's convolution, [C, 1, W] and [C] as an `nn.Conv1d` stores them, and the call that reads them.

    No `nn.Conv1d`, so that adapters for that, which would neither look back alone nor keep a window, refuse it.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(channels, 1, width)), nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, operation: Callable[..., Any], **how: Any) -> Any:
        """An operation of `llamba.kernels.conv1d` on x with these weights."""
        return operation(x, self.weight.squeeze(1), self.bias, **how)
