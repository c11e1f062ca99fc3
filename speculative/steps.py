"""Mixers whose tokens one launch evaluates, and how their cache gets into the launch's buffers: one entry each.

Shapes: B batch, T time, D model width, W conv width, C channels, R slots of raw convolution inputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamba.kernels.decode import Buffers, Cursors, Mamba1Weights, Weights, buffers, mamba1_buffers, mamba1_steps, mamba2_steps
from llamba.models.cache import RecurrentLayer
from llamba.models.mixers import DiscreteMamba2, Mamba1, Mamba2


class Steps(NamedTuple):
    """How a kind of mixer decodes with cursors on the device."""

    buffers: Callable[[Any, int, int, torch.dtype, torch.device], Any]  # mixer, B, tokens of the longest round
    load: Callable[[Any, RecurrentLayer, Tensor], None]  # buffers, the cache of a prompt without held tokens, lengths [B]
    run: Callable[[Any, Tensor, Any, Cursors], Tensor]  # mixer, its input [B, T, D], buffers: what out_proj takes


def _mamba2_buffers(mixer: Mamba2, rows: int, longest: int, dtype: torch.dtype, device: torch.device) -> Buffers:
    c = mixer.config
    groups = c.heads if c.conv_after_repeat else c.groups
    return buffers(rows, c.heads, groups, c.head_dim, c.state, c.conv_width, longest, dtype, device)


def _load(held: Buffers, layer: RecurrentLayer, lengths: Tensor) -> None:
    if layer.state is None or layer.raw is None:  # nothing was read
        held.state.zero_()
        return
    count, width = layer.raw.shape[:2]
    held.state[:count] = layer.state
    places = lengths[:count, None] + torch.arange(-width, 0, device=lengths.device)  # [B, W - 1]
    held.raw[torch.arange(count, device=lengths.device)[:, None], places % held.raw.shape[1]] = layer.raw


def _mamba2_run(mixer: Mamba2, hidden: Tensor, held: Buffers, at: Cursors) -> Tensor:
    c, norm = mixer.config, mixer.norm
    weights = Weights(
        mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, mixer.dt_bias, None if isinstance(mixer, DiscreteMamba2) else mixer.A_log,
        mixer.D, None if norm is None else norm.weight, c.norm_eps, c.conv_activation is not None,
    )  # fmt: skip
    return mamba2_steps(mixer.fused_rows(hidden), weights, held, at)


def _mamba1_buffers(mixer: Mamba1, rows: int, longest: int, dtype: torch.dtype, device: torch.device) -> Buffers:
    c = mixer.config
    return mamba1_buffers(rows, c.inner, c.shared, mixer.conv_channels(), c.state, c.conv_width, longest, dtype, device)


def _mamba1_run(mixer: Mamba1, hidden: Tensor, held: Buffers, at: Cursors) -> Tensor:
    c = mixer.config
    weights = Mamba1Weights(
        mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, mixer.dt_bias * (2 if c.double_dt_bias else 1), mixer.A_log, mixer.D,
        c.state if c.block_gqa else c.head_dim, c.conv_activation is not None,
    )  # fmt: skip
    return mamba1_steps(*mixer.fused_rows(hidden), weights, held, at)


STEPS: dict[type, Steps] = dict.fromkeys((Mamba2, DiscreteMamba2), Steps(_mamba2_buffers, _load, _mamba2_run))
STEPS[Mamba1] = Steps(_mamba1_buffers, _load, _mamba1_run)
