"""Mamba-3 mixer that can begin as rotary attention does: angles of its own beside those that depend on the input.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, S angles.
Source: "Mamba-3" (arXiv 2603.15569). Theirs has no base angle, no bias on angle and share, and a rate without a bias.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamba.kernels.mamba3 import mamba3_matrix, mamba3_scan, mamba3_step
from llamba.models.mixers.base import Mixer
from llamba.models.mixers.config import MixerConfig
from llamba.models.mixers.outline import Mixing, Recurrence
from llamba.models.mixers.parts import QKNorm, at_least_fp32

NOTHING = -40.0  # log of an angle that is none


class Mamba3(Mixer):
    """h <- e^(dt A) h + (1 - l) dt e^(dt A) x' B'^T + l dt x B^T, y = h C + D x; x' and B' of the token before, B and C turned.

    A token turns them by theta + dt pi tanh(angle), theta = e^theta_log. dt = softplus(dt + bias), A = -max(softplus(rate + bias),
    rate_floor) with a bias that makes it -e^A_log where the rate row is 0, l = sigmoid(trap + bias); B and C have a bias for every head
    behind their norms. With theta = 0 and l = 1 this is Mamba-2; without decay and with the teacher's theta, rotary linear attention.
    """

    matrix_parts = ("in_proj", "conv1d", "dt_bias", "A_log", "D", "trap_bias", "theta_log", "B_bias", "C_bias", "q_norm", "k_norm")
    turns = True

    @classmethod
    def defaults(cls, shape: dict[str, Any]) -> dict[str, Any]:
        """With the norm of its output, a linear convolution, and an angle for each that the teacher's attention has."""
        own = {"out_norm": True, "conv_activation": None, "angles": shape.get("angles", shape["head_dim"] // 2)}
        return super().defaults(shape) | own

    def __init__(self, config: MixerConfig, layer_idx: int):
        if config.rotary:
            raise ValueError("mamba3 needs mixer.rotary=false: it turns keys and queries by angles of its own; got true")
        if config.conv_after_repeat:
            raise ValueError("mamba3 needs mixer.conv_after_repeat=false: nothing was published with it; got true")
        if config.window and config.state != config.head_dim:
            raise ValueError(f"mixer.window needs state = head_dim; got {config.state} and {config.head_dim}")
        if not 0 < 2 * config.angles <= config.state:
            raise ValueError(f"mixer.angles must be from 1 to state / 2 = {config.state // 2}; got {config.angles}")
        super().__init__(config, layer_idx)
        heads = config.heads
        for name in ("dt_bias", "D", "A_log", "trap_bias"):
            setattr(self, name, nn.Parameter(torch.zeros(heads)))
        self.theta_log = nn.Parameter(torch.zeros(config.angles))  # slow angles are as sensitive as fast ones, relatively
        self.B_bias, self.C_bias = (nn.Parameter(torch.zeros(heads, config.state)) for _ in range(2))
        if config.qk_norm is not None:
            self.q_norm, self.k_norm = (QKNorm(config.qk_norm, config.state, config.qk_norm_eps) for _ in range(2))

    def rows(self) -> dict[str, int]:
        """z | x | B | C | dt | rate | trap | angle, the order of mamba-ssm."""
        c, H = self.config, self.config.heads
        shared = c.groups * c.state
        return {"z": c.inner, "x": c.shared, "B": shared, "C": H * c.state, "dt": H, "rate": H, "trap": H, "angle": c.angles}

    def conv_channels(self) -> int:
        """x, B and C before the GQA repeat."""
        return sum(self.rows()[name] for name in self.conv_rows())

    def conv_rows(self) -> tuple[str, ...]:
        """x, B and C pass the convolution."""
        return ("x", "B", "C")

    def _project(self, hidden_states: Tensor) -> dict[str, Tensor]:
        parts = super()._project(hidden_states)
        return parts | {"dt": torch.cat([parts.pop(name) for name in ("dt", "rate", "trap", "angle")], -1)}

    def heads_of(self, conv_out: Tensor, rest: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., G, P]; B and C [..., H, N], biases added, not yet turned."""
        c = self.config
        x, b, q = conv_out.split([self.rows()[name] for name in self.conv_rows()], -1)
        x, b, q = (heads.unflatten(-1, (-1, width)) for heads, width in ((x, c.head_dim), (b, c.state), (q, c.state)))
        return x, b.repeat_interleave(c.heads // c.groups, -2) + self.B_bias.to(b.dtype), q + self.C_bias.to(q.dtype)

    def factors(self, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log decay [..., H], angles [..., H, S], step and share of the write that comes at once [..., H], all at least fp32."""
        H = self.config.heads
        step, rate, trap, angle = at_least_fp32(dt).split([H, H, H, self.config.angles], -1)
        step = F.softplus(step + at_least_fp32(self.dt_bias))
        own = at_least_fp32(self.A_log).exp()
        rate = F.softplus(rate + own + torch.log(-torch.expm1(-own)))  # softplus of the last two is `own`
        turn = at_least_fp32(self.theta_log).exp() + step[..., None] * torch.pi * torch.tanh(angle)[..., None, :]
        return -rate.clamp_min(self.config.rate_floor) * step, turn, step, torch.sigmoid(trap + at_least_fp32(self.trap_bias))

    def scan(self, x: Tensor, b: Tensor, c: Tensor | None, dt: Tensor, state: Tensor | None, rec: Recurrence) -> tuple[Tensor, Tensor]:
        """On top of the chunked SSD; see `llamba.kernels.mamba3.mamba3_scan`."""
        a, turn, step, now = self.factors(dt)
        c = torch.zeros_like(b) if c is None else c
        return mamba3_scan(x, a, b, c, turn, step, now, D=self.D, state=state, seq_idx=rec.seq_idx, mask=rec.mask)

    def step(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token; see `llamba.kernels.mamba3.mamba3_step`."""
        a, turn, step, now = self.factors(dt)
        y, state = mamba3_step(x, a, b, c, turn, step, now, D=self.D, state=state)
        return y.to(x.dtype), state

    def mixing(self, hidden_states: Tensor, rec: Recurrence, angles: tuple[Tensor, Tensor] | None = None) -> Mixing:
        """See `llamba.kernels.mamba3.mamba3_matrix`; D on the diagonal."""
        parts = self._project(hidden_states) | self._angles(angles, *hidden_states.shape[:2])
        _, b, c = self._turned_heads(self._convolve(parts, rec, None)[0], parts)
        a, turn, step, now = self.factors(parts["dt"])
        skip = at_least_fp32(self.D).expand(len(a), -1)  # [B, H]
        own = Mixing((skip, *(value.transpose(1, 2) for value in (a, b, c, turn, step, now))), partial(_matrix_rows, rec))
        return own if self.sight is None else self._with_window(own, parts, rec)


def _matrix_rows(rec: Recurrence, inputs: Sequence[Tensor], rows: slice | Tensor) -> Tensor:
    skip, values = inputs[0], [value.transpose(1, 2) for value in inputs[1:]]
    made = mamba3_matrix(*values, seq_idx=rec.seq_idx, mask=rec.mask, rows=rows)
    index = torch.arange(made.shape[-1], device=made.device)
    own = index[rows][:, None] == index  # [I, T]
    own = own[None] if rec.mask is None else own & rec.mask[:, None]
    return made + skip[:, :, None, None] * own[:, None]


def official(
    weights: Mapping[str, Tensor], heads: int, groups: int, head_dim: int, angles: int, **more: Any
) -> tuple[MixerConfig, dict[str, Tensor]]:
    """The configuration and the weights of `Mamba3` that is mamba-ssm 2.3's `Mamba3` (SISO, without output norm), from its state dict.

    `heads`, `groups` (its `ngroups`), `head_dim`, `angles` (its `num_rope_angles`) as there. Coordinates that are turned together stand
    next to each other there, and half a rotation apart here; its keys and queries are shared within a group, ours are written out.
    Raises ValueError for a state dict with an output norm, and for one with projections of another size.
    """
    if "norm.weight" in weights:
        raise ValueError("mamba3 norms its output behind the gate; the layer needs is_outproj_norm=False, got a norm.weight")
    projection, N = weights["in_proj.weight"], weights["B_norm.weight"].shape[0]
    inner, shared = heads * head_dim, groups * N
    sizes = [inner, inner, shared, shared, heads, heads, heads, angles]
    if projection.shape[0] != sum(sizes):
        raise ValueError(
            f"in_proj.weight must have {sum(sizes)} rows for these heads, groups and angles (rank 1); got {projection.shape[0]}"
        )
    z, x, b, c, *rest = projection.split(sizes)
    order = torch.cat((torch.arange(0, 2 * angles, 2), torch.arange(1, 2 * angles, 2), torch.arange(2 * angles, N)))
    b, c = (t.view(groups, N, -1)[:, order].repeat_interleave(heads // groups, 0).flatten(0, 1) for t in (b, c))
    zeros = projection.new_zeros(heads)
    made = {
        "in_proj.weight": torch.cat((z, x, b, c, *rest)), "out_proj.weight": weights["out_proj.weight"], "D": weights["D"],
        "dt_bias": weights["dt_bias"], "A_log": torch.full_like(zeros, 2.0).log().log(), "trap_bias": zeros,
        "theta_log": projection.new_full((angles,), NOTHING), "B_bias": weights["B_bias"].reshape(heads, N)[:, order],
        "C_bias": weights["C_bias"].reshape(heads, N)[:, order], "k_norm.weight": weights["B_norm.weight"][order],
        "q_norm.weight": weights["C_norm.weight"][order],
    }  # fmt: skip
    config = MixerConfig(
        "mamba3", projection.shape[1], heads, heads, head_dim, N, conv_width=1, conv_activation=None, proj_bias=False, qk_norm="rms",
        angles=angles, **{"rate_floor": 1e-4, "qk_norm_eps": 1e-5, **more},
    )  # fmt: skip
    channels = heads * (head_dim + 2 * N)
    return config, made | {"conv1d.weight": projection.new_ones(channels, 1, 1), "conv1d.bias": projection.new_zeros(channels)}
