"""Mamba-1 mixer: a decay for every channel and state coordinate.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, S = H P / N groups of state.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamba.kernels.selective_scan import selective_scan, selective_scan_step
from llamba.models.mixers.base import Mixer
from llamba.models.mixers.config import MixerConfig
from llamba.models.mixers.outline import Recurrence
from llamba.models.mixers.parts import at_least_fp32


class Mamba1(Mixer):
    """Mamba (arXiv 2312.00752) in the grouped form of Mamba-in-Llama: x, B and C split into S groups of N coordinates.

    With N < P a head becomes P / N sub-heads; sub-head s pairs coordinates s N .. (s + 1) N of its own query head's q, k and v.
    With N = P the whole head is one group, and the layer can express linear attention.
    """

    reads_heads = False  # a head is read in groups of N coordinates
    projects_steps = True
    fold_after = 1  # its replay costs as much as folding

    @classmethod
    def defaults(cls, shape: dict[str, Any]) -> dict[str, Any]:
        """Mamba's own widths: 16 states a channel, steps through D / 16 coordinates."""
        return {"state": min(16, shape["head_dim"]), "dt_rank": -(-shape["hidden_size"] // 16)}

    def __init__(self, config: MixerConfig, layer_idx: int):
        if config.head_dim % config.state:
            raise ValueError(f"mamba1 needs head_dim to be a multiple of state; got head_dim {config.head_dim} and state {config.state}")
        super().__init__(config, layer_idx)
        self.dt_proj = nn.Linear(config.dt_rank, config.inner, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(config.inner))
        self.A_log = nn.Parameter(torch.zeros(config.inner, config.state))
        self.D = nn.Parameter(torch.zeros(config.inner))

    def rows(self) -> dict[str, int]:
        """z | x | B | C | dt (low rank), the order of the published fused layer."""
        c = self.config
        return {"z": c.inner, "x": c.shared, "B": c.shared, "C": c.inner, "dt": c.dt_rank}

    def conv_channels(self) -> int:
        """x alone, before or (compatibility) behind the GQA repeat."""
        return self.config.inner if self.config.conv_after_repeat else self.config.shared

    def conv_rows(self) -> tuple[str, ...]:
        """Only x passes the convolution."""
        return ("x",)

    def fused_rows(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """z | x | B | C | ... and the steps [B, T, H P] as `llamba.kernels.decode` takes them: B and C normalised, x perhaps repeated."""
        if self.config.qk_norm is None and not self.config.conv_after_repeat:
            rows = self.in_proj(hidden_states)
            return rows, self.dt_proj(rows[..., -self.config.dt_rank :])
        parts = self._project(hidden_states)
        return torch.cat((parts["z"], self._conv_in(parts), parts["B"], parts["C"]), -1), parts["dt"]

    def _project(self, hidden_states: Tensor) -> dict[str, Tensor]:
        parts = super()._project(hidden_states)
        parts["dt"] = self.dt_proj(parts["dt"])  # [B, T, H P]
        return parts

    def _conv_in(self, parts: dict[str, Tensor]) -> Tensor:
        return self._repeat(parts["conv"]) if self.config.conv_after_repeat else parts["conv"]

    def _repeat(self, shared: Tensor) -> Tensor:  # [..., G P] -> [..., H P]
        c = self.config
        block = c.state if c.block_gqa else c.head_dim
        return shared.unflatten(-1, (-1, block)).repeat_interleave(c.heads // c.groups, -2).flatten(-2)

    def heads_of(self, conv_out: Tensor, rest: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x and B [..., G P] (x [..., H P] behind the repeat) and C [..., H P]."""
        return conv_out, rest["B"], rest["C"]

    def _expand(self, x: Tensor, b: Tensor, c: Tensor | None, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x if self.config.conv_after_repeat else self._repeat(x)  # [..., H P]
        b = self._repeat(b).unflatten(-1, (-1, self.config.state))  # [..., S, N]
        c = torch.zeros_like(b) if c is None else c.unflatten(-1, (-1, self.config.state))
        bias = at_least_fp32(self.dt_bias) * (2 if self.config.double_dt_bias else 1)
        return x, b, c, F.softplus(at_least_fp32(dt) + bias)

    def scan(self, x: Tensor, b: Tensor, c: Tensor | None, dt: Tensor, state: Tensor | None, rec: Recurrence) -> tuple[Tensor, Tensor]:
        """Chunk-parallel selective scan; see `llamba.kernels.selective_scan.selective_scan`."""
        x, b, c, step = self._expand(x, b, c, dt)
        A = -at_least_fp32(self.A_log).exp()
        y, state = selective_scan(x, step, A, b, c, D=self.D, state=state, seq_idx=rec.seq_idx, mask=rec.mask)
        return y.unflatten(-1, (self.config.heads, -1)), state

    def step(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token; see `llamba.kernels.selective_scan.selective_scan_step`."""
        x, b, c, step = self._expand(x, b, c, dt)
        y, state = selective_scan_step(x, step, -at_least_fp32(self.A_log).exp(), b, c, D=self.D, state=state)
        return y.unflatten(-1, (self.config.heads, -1)), state
