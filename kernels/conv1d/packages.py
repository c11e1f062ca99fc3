"""The causal convolution by the package causal-conv1d, which runs where it is asked for.

Shapes: B batch, T time, C channels, W conv width.
"""

import torch
from torch import Tensor

from ..choice import Obstacle, load


def obstacles(x: Tensor, weight: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> dict[str, Obstacle]:
    """Why the package cannot take these arguments of `causal_conv1d`, None where it can."""
    (C, W), reason = weight.shape, None
    if not 2 <= W <= 4:
        reason = f"it takes W from 2 to 4, got {W}"
    elif C % 8:
        reason = f"beside the tokens of one channel it wants C a multiple of 8, got {C}"
    elif state is not None and seq_idx is not None:
        reason = "it takes a state or documents, not both: not every version says which document the state belongs to"
    return {"causal_conv1d": reason}


def by_causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor, docs: Tensor | None) -> Tensor:
    """`causal_conv1d_fn` on tokens that are all real, with the channels of a token side by side; shapes as in `causal_conv1d`.

    With documents `state` is zeros, which is what the package takes then.
    """
    convolve = load("conv1d", "causal_conv1d", "causal_conv1d_fn")
    if any(stride % 8 for stride in x.stride()[:2]) or x.stride(2) != 1:
        x = x.contiguous()
    seq_idx = None if docs is None else docs.to(torch.int32).contiguous()
    before = state.contiguous().transpose(1, 2) if docs is None else None
    bias = None if bias is None else bias.to(weight.dtype)
    return convolve(x.transpose(1, 2), weight, bias, seq_idx=seq_idx, initial_states=before, activation=activation).transpose(1, 2)
