"""Mixers whose tokens one launch evaluates, and how their cache gets into the launch's buffers: one entry each.

Shapes: B batch, T time, D model width, W conv width, C channels, R slots of raw convolution inputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamba.kernels.common import accumulator
from llamba.kernels.decode import Buffers, Cursors, Mamba1Weights, Weights, buffers, mamba1_buffers, mamba1_steps, mamba2_steps
from llamba.kernels.window import Held, Rest, window_steps
from llamba.models.cache import RecurrentLayer
from llamba.models.mixers import DiscreteMamba2, Mamba1, Mamba2

Angles = tuple[Tensor, Tensor]


class Steps(NamedTuple):
    """How a kind of mixer decodes with cursors on the device."""

    buffers: Callable[[Any, int, int, torch.dtype, torch.device], Any]  # mixer, B, tokens of the longest round
    load: Callable[[Any, RecurrentLayer, Tensor], None]  # buffers, the cache of a prompt without held tokens, lengths [B]
    # mixer, its input [B, T, D], buffers, cosines and sines [B, T, Q] where it turns heads: what out_proj takes
    run: Callable[[Any, Tensor, Any, Cursors, Angles | None], Tensor]


class Windowed(NamedTuple):
    """The buffers of a mixer that sees through a window beside its recurrence."""

    own: Buffers
    held: Held


def _mamba2_buffers(mixer: Mamba2, rows: int, longest: int, dtype: torch.dtype, device: torch.device) -> Buffers | Windowed:
    c = mixer.config
    groups = c.heads if c.conv_after_repeat else c.groups
    own = buffers(rows, c.heads, groups, c.head_dim, c.state, c.conv_width, longest, dtype, device)
    if mixer.sight is None:
        return own
    slots = mixer.sight.sinks + mixer.sight.window + 2 * longest  # what a round overwrites is out of sight of the next one
    keys, values = torch.zeros(2, rows, c.groups, slots, c.head_dim, dtype=dtype, device=device).unbind()
    total = torch.zeros(rows, c.groups, c.head_dim, dtype=accumulator(dtype), device=device)
    return Windowed(own, Held(keys, values, total, torch.zeros(rows, c.groups, dtype=torch.long, device=device)))


def _load_mamba2(held: Buffers | Windowed, layer: RecurrentLayer, lengths: Tensor) -> None:
    if isinstance(held, Windowed):
        for part in held.held:
            part.zero_()
        if layer.ring is not None:
            layer.ring.copy(held.held)
        held = held.own
    _load(held, layer, lengths)


def _load(held: Buffers, layer: RecurrentLayer, lengths: Tensor) -> None:
    if layer.state is None or layer.raw is None:  # nothing was read
        held.state.zero_()
        return
    count, width = layer.raw.shape[:2]
    held.state[:count] = layer.state
    places = lengths[:count, None] + torch.arange(-width, 0, device=lengths.device)  # [B, W - 1]
    held.raw[torch.arange(count, device=lengths.device)[:, None], places % held.raw.shape[1]] = layer.raw


def _mamba2_run(mixer: Mamba2, hidden: Tensor, held: Buffers | Windowed, at: Cursors, angles: Angles | None) -> Tensor:
    c, norm = mixer.config, mixer.norm
    turns = angles if c.rotary else None
    weights = Weights(
        mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, mixer.dt_bias, None if isinstance(mixer, DiscreteMamba2) else mixer.A_log,
        mixer.D, None if norm is None else norm.weight, c.norm_eps, c.conv_activation is not None,
    )  # fmt: skip
    if not isinstance(held, Windowed):
        return mamba2_steps(mixer.fused_rows(hidden), weights, held, at, angles=turns)
    assert mixer.sight is not None and angles is not None
    rows, heads, scores = mixer.windowed_rows(hidden)
    y = mamba2_steps(rows, weights, held.own, at, angles=turns)
    y = y if mixer.join is None else y * mixer.join
    rest = Rest(mixer.rest_bias, mixer.rest_growth, mixer.rest_mean)
    return window_steps(heads, scores, y, rest, angles, held.held, at, mixer.sight, c.head_dim**-0.5)


def _mamba1_buffers(mixer: Mamba1, rows: int, longest: int, dtype: torch.dtype, device: torch.device) -> Buffers:
    c = mixer.config
    return mamba1_buffers(rows, c.inner, c.shared, mixer.conv_channels(), c.state, c.conv_width, longest, dtype, device)


def _mamba1_run(mixer: Mamba1, hidden: Tensor, held: Buffers, at: Cursors, angles: Angles | None) -> Tensor:
    c = mixer.config
    weights = Mamba1Weights(
        mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, mixer.dt_bias * (2 if c.double_dt_bias else 1), mixer.A_log, mixer.D,
        c.state if c.block_gqa else c.head_dim, c.conv_activation is not None,
    )  # fmt: skip
    return mamba1_steps(*mixer.fused_rows(hidden), weights, held, at)


STEPS: dict[type, Steps] = dict.fromkeys((Mamba2, DiscreteMamba2), Steps(_mamba2_buffers, _load_mamba2, _mamba2_run))
STEPS[Mamba1] = Steps(_mamba1_buffers, _load, _mamba1_run)
