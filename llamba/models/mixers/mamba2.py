"""Mamba-2 and discrete Mamba-2 mixers: one recurrence, two rules for decay and write strength.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width (P where K and Q became B and C).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamba.kernels.ssd import ssd, ssd_fold, ssd_matrix, ssd_resume, ssd_step
from llamba.models.mixers.base import Mixer
from llamba.models.mixers.config import MixerConfig
from llamba.models.mixers.outline import Mixing, Recurrence
from llamba.models.mixers.parts import at_least_fp32
from llamba.models.tree import Tree


class Mamba2(Mixer):
    """Mamba-2 (arXiv 2405.21060) with one state per query head: h <- e^(dt A) h + dt x B^T, y = h C + D x, dt = softplus(dt + bias)."""

    has_rate: ClassVar[bool] = True  # A, beside the step

    @classmethod
    def defaults(cls, shape: dict[str, Any]) -> dict[str, Any]:
        """With the norm of Mamba-2's output."""
        return super().defaults(shape) | {"out_norm": True}

    def __init__(self, config: MixerConfig, layer_idx: int):
        if config.state != config.head_dim and (config.qk_norm is not None or config.rotary or config.window):
            raise ValueError(f"norms, rotation and windows need state = head_dim; got {config.state} and {config.head_dim}")
        super().__init__(config, layer_idx)
        self.dt_bias = nn.Parameter(torch.zeros(config.heads))
        self.D = nn.Parameter(torch.zeros(config.heads))
        if self.has_rate:
            self.A_log = nn.Parameter(torch.zeros(config.heads))

    def rows(self) -> dict[str, int]:
        """z | x | B | C | dt, the order of Mamba-2 and Bamba."""
        c = self.config
        return {"z": c.inner, "x": c.shared, "B": c.groups * c.state, "C": c.heads * c.state, "dt": c.heads}

    def conv_channels(self) -> int:
        """x, B and C, before or (compatibility) behind the GQA repeat."""
        c = self.config
        return (c.heads if c.conv_after_repeat else c.groups) * (c.head_dim + c.state) + c.heads * c.state

    def conv_rows(self) -> tuple[str, ...]:
        """x, B and C pass the convolution."""
        return ("x", "B", "C")

    def fused_rows(self, hidden_states: Tensor) -> Tensor:
        """z | x | B | C | dt [B, T, ...] as `llamba.kernels.decode` takes them: B and C normalised, x and B perhaps repeated."""
        if self.config.qk_norm is None and not self.config.conv_after_repeat:
            return self.in_proj(hidden_states)
        parts = self._project(hidden_states)
        return torch.cat((parts["z"], self._conv_in(parts), parts["dt"]), -1)

    def windowed_rows(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`fused_rows`, the heads x | B | C [B, T, 2 G + H, P] before convolution and repeat, and the rest's score [B, T, H]."""
        c = self.config
        if c.qk_norm is None and not c.conv_after_repeat:
            together = self.in_proj(hidden_states)
            rows, rest = together[..., : -c.heads], together[..., -c.heads :]
            return rows, rows[..., c.inner : -c.heads].unflatten(-1, (-1, c.head_dim)), rest
        parts = self._project(hidden_states)
        rows = torch.cat((parts["z"], self._conv_in(parts), parts["dt"]), -1)
        return rows, parts["conv"].unflatten(-1, (-1, c.head_dim)), parts["rest"]

    def _conv_in(self, parts: dict[str, Tensor]) -> Tensor:
        c, together = self.config, parts["conv"]
        if not c.conv_after_repeat:
            return together
        x, b, q = together.split([c.shared, c.groups * c.state, c.heads * c.state], -1)
        return torch.cat((self._repeat(x), self._repeat(b), q), -1)

    def _repeat(self, shared: Tensor) -> Tensor:  # [..., G P] -> [..., H P]
        c = self.config
        return shared.unflatten(-1, (c.groups, -1)).repeat_interleave(c.heads // c.groups, -2).flatten(-2)

    def heads_of(self, conv_out: Tensor, rest: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., G, P], B [..., G, N] (H heads behind the repeat) and C [..., H, N]."""
        c = self.config
        shared = c.heads if c.conv_after_repeat else c.groups
        x, b, q = conv_out.split([shared * c.head_dim, shared * c.state, c.heads * c.state], -1)
        return x.unflatten(-1, (shared, c.head_dim)), b.unflatten(-1, (shared, c.state)), q.unflatten(-1, (c.heads, c.state))

    def factors(self, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        """From the raw step, what `ssd` takes as a and dt: here the rate [H] and the step [..., H], both at least fp32."""
        return -at_least_fp32(self.A_log).exp(), F.softplus(at_least_fp32(dt) + at_least_fp32(self.dt_bias))

    def decay(self, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log decay and write strength (both [..., H], at least fp32) from the raw step."""
        rate, step = self.factors(dt)
        return (rate if step is None else rate * step), step

    def scan(self, x: Tensor, b: Tensor, c: Tensor | None, dt: Tensor, state: Tensor | None, rec: Recurrence) -> tuple[Tensor, Tensor]:
        """Chunked SSD; see `llamba.kernels.ssd.ssd`."""
        a, step = self.factors(dt)
        if c is None:
            c = b.new_zeros(*b.shape[:-2], self.config.heads, b.shape[-1])
        return ssd(x, a, b, c, dt=step, D=self.D, state=state, seq_idx=rec.seq_idx, mask=rec.mask)

    def resume(self, inputs: tuple[Tensor, ...], c: Tensor, state: Tensor | None, firsts: list[int], tree: Tree | None = None) -> Tensor:
        """The dual form over the held tokens; see `llamba.kernels.ssd.ssd_resume`."""
        x, b, dt = inputs
        a, step = self.decay(dt)
        first = firsts[0] if min(firsts) == max(firsts) else torch.tensor(firsts, device=x.device)
        return ssd_resume(x, a, b, c, firsts=first, dt=step, D=self.D, state=state, ancestors=None if tree is None else tree.ancestors)

    def _advance(self, inputs: tuple[Tensor, ...], mask: Tensor | None, state: Tensor | None) -> Tensor:
        x, b, dt = inputs
        a, step = self.decay(dt)
        return ssd_fold(x, a, b, dt=step, mask=mask, state=state)

    def step(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token; see `llamba.kernels.ssd.ssd_step`."""
        a, step = self.decay(dt)
        return ssd_step(x, a, b, c, dt=step, D=self.D, state=state)

    def mixing(self, hidden_states: Tensor, rec: Recurrence, angles: tuple[Tensor, Tensor] | None = None) -> Mixing:
        """M[i, j] = C_i . B_j e^(a_(j+1) + ... + a_i) dt_j, and D on the diagonal (MOHAWK, arXiv 2408.10189, section 4.1)."""
        parts = self._project(hidden_states) | self._angles(angles, *hidden_states.shape[:2])
        _, b, c = self._turned_heads(self._convolve(parts, rec, None)[0], parts)
        a, step = self.decay(parts["dt"])
        b = b.repeat_interleave(c.shape[2] // b.shape[2], 2)  # [B, T, H, N]
        by_token = [a, b, c] + ([] if step is None else [step])
        skip = at_least_fp32(self.D).expand(len(a), -1)  # [B, H]
        own = Mixing((skip, *(value.transpose(1, 2) for value in by_token)), partial(_matrix_rows, rec))
        return own if self.sight is None else self._with_window(own, parts, rec)


def _matrix_rows(rec: Recurrence, inputs: Sequence[Tensor], rows: slice | Tensor) -> Tensor:
    skip, (a, b, c, *steps) = inputs[0], (value.transpose(1, 2) for value in inputs[1:])
    made = ssd_matrix(a, b, c, dt=steps[0] if steps else None, seq_idx=rec.seq_idx, mask=rec.mask, rows=rows)
    index = torch.arange(a.shape[1], device=a.device)
    own = index[rows][:, None] == index  # [I, T]
    own = own[None] if rec.mask is None else own & rec.mask[:, None]
    return made + skip[:, :, None, None] * own[:, None]


class DiscreteMamba2(Mamba2):
    """Discrete Mamba-2 of Phi-Mamba (arXiv 2408.10189): h <- e^(-softplus(a + bias)) h + x B^T; the input is not scaled by the step."""

    has_rate = False

    @classmethod
    def defaults(cls, shape: dict[str, Any]) -> dict[str, Any]:
        """As Phi-Mamba: a linear convolution, no norm."""
        return super().defaults(shape) | {"out_norm": False, "conv_activation": None}

    def factors(self, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log decay -softplus(a + bias); write strength 1 (None)."""
        return -F.softplus(at_least_fp32(dt) + at_least_fp32(self.dt_bias)), None
