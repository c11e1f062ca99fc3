"""Causal depthwise convolution over time, with an optional SiLU.

Shapes: B batch, T time, C channels, W conv width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..choice import choose
from ..common import accumulator, check_positive, check_rank, check_shape
from .absent import final_window, pack, unpack
from .packages import by_causal_conv1d, obstacles
from .reference import sequential
from .ring import ring as ring_in_torch
from .shifted import shifted

__all__ = ["causal_conv1d", "causal_conv1d_ring", "causal_conv1d_span", "causal_conv1d_step"]

Convolution = Callable[[Tensor, Tensor, Tensor | None, str | None, Tensor, Tensor | None], Tensor]
FORMS = ("torch", "sequential", "triton", "causal_conv1d")


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
    impl: see `kernels.choice`.
    Raises `ValueError` for shapes that do not fit together, an unknown `activation`, and an `impl` that is unknown or cannot run here.
    """
    _check(x, weight, bias, activation, state, seq_idx, mask)
    form = choose("conv1d", impl, FORMS, x, packages=obstacles(x, weight, state, seq_idx))
    B, _, C = x.shape
    state = x.new_zeros(B, weight.shape[1] - 1, C) if state is None else state.to(x.dtype)
    if form == "sequential":
        return sequential(x, weight, bias, activation, state, seq_idx, mask)
    convolve: Convolution = shifted
    if form == "triton":
        from .triton_op import fused as convolve
    elif form == "causal_conv1d":
        convolve = by_causal_conv1d
    if mask is None:
        return convolve(x, weight, bias, activation, state, seq_idx), final_window(x, state, seq_idx, None)
    packed, docs, order = pack(x, seq_idx, mask)
    y = convolve(packed, weight, bias, activation, state, docs)
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


def causal_conv1d_span(
    span: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, windows: Tensor | None = None
) -> Tensor:
    """`causal_conv1d` of the few tokens behind a window: span [B, W - 1 + T, C] raw inputs, oldest first -> [B, T, C].

    weight [C, W]; bias [C]. `windows` [T, W]: the columns of the span that each of T tokens sees, oldest first, where its tokens are a
    tree and not a chain; the span may then have any number of columns. The work is done at once in memory W times that of the span.
    Raises `ValueError` where the channels differ, the span holds no token, or the windows are not W wide.
    """
    (_, L, C), W = span.shape, weight.shape[1]
    check_shape("weight", weight, C, W)
    check_positive("T", L - W + 1)
    _check_activation(activation)
    if windows is not None:
        check_shape("windows", windows, windows.shape[0], W)
    seen = span.unfold(1, W, 1) if windows is None else span[:, windows].transpose(2, 3)  # [B, T, C, W]
    y = (seen * weight.to(accumulator(span.dtype))).sum(-1)  # [B, T, C]
    if bias is not None:
        y = y + bias
    return (y if activation is None else torch.nn.functional.silu(y)).to(span.dtype)


def causal_conv1d_ring(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    ring: Tensor,
    length: Tensor,
    new: Tensor,
    impl: str = "auto",
) -> Tensor:
    """Convolve new[b] of the T tokens x [B, T, C] of each row behind length[b] others, and put their raw inputs into the ring.

    weight [C, W]; bias [C]; ring [B, R, C] holds the raw input of position p in slot p mod R and is changed; length and new [B]
    integers on the device of x, which a CUDA graph may read. Tokens are taken back by a smaller length the next time.
    Returns y [B, T, C] in the dtype of x, 0 from new[b] on.
    Raises `ValueError` for shapes that do not fit, for R < W - 1 + T, and for an `impl` that is unknown or cannot run here.
    """
    (B, T, C), (R, W) = x.shape, (ring.shape[1], weight.shape[1])
    check_shape("weight", weight, C, W)
    check_shape("ring", ring, B, R, C)
    check_shape("length", length, B)
    check_shape("new", new, B)
    _check_activation(activation)
    if R < W - 1 + T:
        raise ValueError(f"the ring needs W - 1 + T = {W - 1 + T} slots, got {R}")
    if choose("conv1d", impl, ("torch", "triton"), x) == "triton":
        from .triton_op import fused_ring

        return fused_ring(x, weight, bias, activation, ring, length, new)
    return ring_in_torch(x, weight, bias, activation, ring, length, new)


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
