"""Causal depthwise convolution over time, with an optional SiLU.

Shapes: B batch, T time, C channels, W conv width.
"""

import torch
from torch import Tensor

from ..choice import choose
from ..common import accumulator, check_positive, check_rank, check_shape
from .absent import final_window, pack, unpack
from .reference import sequential
from .shifted import shifted

__all__ = ["causal_conv1d", "causal_conv1d_span", "causal_conv1d_step"]

FORMS = ("torch", "sequential")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with the W latest inputs; weight[:, W - 1] meets the current token.

    x [B, T, C]; weight [C, W]; bias [C]; activation "silu" or None; state [B, W - 1, C] the raw inputs before the first
    token, oldest first (None: zeros).
    seq_idx [B, T] non-decreasing document numbers: no window reaches over a boundary, and `state` belongs to document 0.
    mask [B, T] bool, True for real tokens: the others are absent, windows skip over them, and their output is 0.
    Returns y [B, T, C] and the last W - 1 real inputs [B, W - 1, C], zero where of an earlier document than the last real
    token, both in the dtype of x.
    Raises `ValueError` for shapes that do not fit together and for an unknown `impl` or `activation`.
    """
    form = choose("conv1d", impl, FORMS, x)
    _check(x, weight, bias, activation, state, seq_idx, mask)
    B, _, C = x.shape
    state = x.new_zeros(B, weight.shape[1] - 1, C) if state is None else state.to(x.dtype)
    if form == "sequential":
        return sequential(x, weight, bias, activation, state, seq_idx, mask)
    if mask is None:
        return shifted(x, weight, bias, activation, state, seq_idx), final_window(x, state, seq_idx, None)
    packed, docs, order = pack(x, seq_idx, mask)
    y = shifted(packed, weight, bias, activation, state, docs)
    return unpack(y, order, mask), final_window(packed, state, docs, mask)


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance `causal_conv1d` by one token.

    x [B, C]; weight [C, W]; bias [C]; state [B, W - 1, C] raw inputs, oldest first.
    Returns y [B, C] in the dtype of x and the new window [B, W - 1, C]; the given one is left as it is.
    Raises `ValueError` if x or the window does not fit the weight, and for an unknown `activation`.
    """
    (B, C), (_, W) = x.shape, weight.shape
    check_shape("weight", weight, C, W)
    check_shape("state", state, B, W - 1, C)
    _check_activation(activation)
    acc = accumulator(x.dtype)
    window = torch.cat([state.to(x.dtype), x[:, None]], 1)  # [B, W, C]
    y = (window * weight.to(acc).t()).sum(1)  # [B, C]
    if bias is not None:
        y = y + bias
    return (y if activation is None else torch.nn.functional.silu(y)).to(x.dtype), window[:, 1:]


def causal_conv1d_span(span: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """`causal_conv1d` of the few tokens behind a window: span [B, W - 1 + T, C] raw inputs, oldest first -> [B, T, C].

    weight [C, W]; bias [C]. The work is done at once in memory W times that of the span. Raises `ValueError` where the channels
    differ or the span holds no token.
    """
    (_, L, C), W = span.shape, weight.shape[1]
    check_shape("weight", weight, C, W)
    check_positive("T", L - W + 1)
    _check_activation(activation)
    y = (span.unfold(1, W, 1) * weight.to(accumulator(span.dtype))).sum(-1)  # [B, T, C]
    if bias is not None:
        y = y + bias
    return (y if activation is None else torch.nn.functional.silu(y)).to(span.dtype)


def _check_activation(activation: str | None) -> None:
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    mask: Tensor | None,
) -> None:
    check_rank("x", x, "BTC")
    check_rank("weight", weight, "CW")
    (B, T, C), W = x.shape, weight.shape[1]
    _check_activation(activation)
    check_positive("T", T)
    check_positive("W", W)
    check_shape("weight", weight, C, W)
    check_shape("bias", bias, C)
    check_shape("state", state, B, W - 1, C)
    check_shape("seq_idx", seq_idx, B, T)
    check_shape("mask", mask, B, T)
