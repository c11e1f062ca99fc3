"""Mixers of the gated delta rule: Gated DeltaNet, a decay for every head, and Kimi Delta Attention, one for every key channel.

Shapes: B batch, T time, S slots, I rows asked for, H query heads, G key/value heads, P head width, N = P state width.
A key k is kept as its direction b = k / |k| and its length, by which its value is multiplied: that is what linear attention writes.
Erasing has a gate of its own, so that with the gate shut and no decay the layer is the teacher's linear attention, exactly.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamba.kernels.delta import delta_fold, delta_matrix, delta_resume, delta_rule, delta_step
from llamba.models.cache import RecurrentLayer, write
from llamba.models.mixers.base import Mixer
from llamba.models.mixers.config import MixerConfig
from llamba.models.mixers.outline import Mixing, Recurrence
from llamba.models.mixers.parts import at_least_fp32
from llamba.models.tree import Tree

SHORTEST = 1e-24  # added to |k|^2: the direction of no key is no direction


def direction(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [..., N] as directions and lengths [..., 1], whose product they are; at least fp32."""
    keys = at_least_fp32(keys)
    length = (keys.square().sum(-1, keepdim=True) + SHORTEST).sqrt()
    return keys / length, length


def written(x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """|k| x and b = k / |k| in the dtype of x, of values x [..., P] and keys [..., N]."""
    b, length = direction(keys)
    return (x * length).to(x.dtype), b.to(x.dtype)


class GatedDelta(Mixer):
    """Gated DeltaNet (arXiv 2412.06464) with erasing and writing apart: h <- h' + (|k| x - e h' b) b^T, h' = e^(dt A) h, y = h C.

    b = k / |k|, dt = softplus(dt + bias), e = sigmoid(erase + bias). The cache keeps what every token wrote, u = |k| x - e h' b, so that
    tokens are replayed all at once.
    """

    matrix_parts: ClassVar[tuple[str, ...]] = ("in_proj", "conv1d", "dt_bias", "A_log", "erase_bias", "q_norm", "k_norm")
    has_skip, erases = False, True

    @classmethod
    def defaults(cls, shape: dict[str, Any]) -> dict[str, Any]:
        """With the norm of its output, and a linear convolution: directions of keys behind a SiLU lie close together."""
        return super().defaults(shape) | {"out_norm": True, "conv_activation": None}

    def __init__(self, config: MixerConfig, layer_idx: int):
        if config.state != config.head_dim:
            raise ValueError(f"{config.kind} needs state = head_dim (K and Q become B and C); got {config.state} and {config.head_dim}")
        if config.conv_after_repeat:
            raise ValueError(f"{config.kind} needs mixer.conv_after_repeat=false: nothing was published with it; got true")
        super().__init__(config, layer_idx)
        self.dt_bias = nn.Parameter(torch.zeros(self.decays()))
        self.A_log = nn.Parameter(torch.zeros(config.heads))
        self.erase_bias = nn.Parameter(torch.zeros(config.heads))

    def decays(self) -> int:
        """How many decays a token has."""
        return self.config.heads

    def rows(self) -> dict[str, int]:
        """z | x | B | C | dt | erase."""
        c = self.config
        return {"z": c.inner, "x": c.shared, "B": c.shared, "C": c.inner, "dt": c.heads, "erase": c.heads}

    def conv_channels(self) -> int:
        """x, B and C before the GQA repeat."""
        return 2 * self.config.shared + self.config.inner

    def conv_rows(self) -> tuple[str, ...]:
        """x, B and C pass the convolution."""
        return ("x", "B", "C")

    def _project(self, hidden_states: Tensor) -> dict[str, Tensor]:
        parts = super()._project(hidden_states)
        return parts | {"dt": torch.cat((self._steps(parts["dt"]), parts.pop("erase")), -1)}

    def _steps(self, rows: Tensor) -> Tensor:
        """The raw steps [B, T, decays] from the dt rows."""
        return rows

    def heads_of(self, conv_out: Tensor, rest: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x and keys B [..., G, P], and C [..., H, P]."""
        c = self.config
        x, b, q = conv_out.unflatten(-1, (-1, c.head_dim)).split([c.groups, c.groups, c.heads], -2)
        return x, b, q

    def decay(self, steps: Tensor) -> Tensor:
        """Log decays [..., H] from the raw steps, at least fp32."""
        return -at_least_fp32(self.A_log).exp() * F.softplus(at_least_fp32(steps) + at_least_fp32(self.dt_bias))

    def gates(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Log decays and the gate of erasing [..., H], at least fp32, from the raw steps and the rows of the gate, side by side."""
        steps, gate = dt.split([self.decays(), self.config.heads], -1)
        return self.decay(steps), torch.sigmoid(at_least_fp32(gate) + at_least_fp32(self.erase_bias))

    def scan(self, x: Tensor, b: Tensor, c: Tensor | None, dt: Tensor, state: Tensor | None, rec: Recurrence) -> tuple[Tensor, Tensor]:
        """The chunked delta rule; see `llamba.kernels.delta.delta_rule`."""
        assert c is not None, "the state behind held tokens is a sum of what they wrote"
        a, erase = self.gates(dt)
        x, b = written(x, b)
        return delta_rule(x, a, b, c, erase, state=state, seq_idx=rec.seq_idx, mask=rec.mask)

    def step(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token; see `llamba.kernels.delta.delta_step`."""
        a, erase = self.gates(dt)
        x, b = written(x, b)
        return delta_step(x, a, b, c, erase, state=state)

    def append_inputs(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, layer: RecurrentLayer, tree: Tree | None) -> Tensor:
        """What the new tokens write and read behind the held ones; see `llamba.kernels.delta.delta_resume`. The cache holds u, b and dt."""
        _, erase = self.gates(dt)
        x, b = written(x, b)
        nothing = at_least_fp32(x).new_zeros(*c.shape[:3], self.config.head_dim)
        (u, keys, steps), firsts = layer.append_inputs((nothing, b, dt))
        first = firsts[0] if min(firsts) == max(firsts) else torch.tensor(firsts, device=x.device)
        y, updates = delta_resume(
            x,
            self.gates(steps)[0],
            keys,
            c,
            erase,
            u=u,
            firsts=first,
            state=layer.state,
            ancestors=None if tree is None else tree.ancestors,
        )
        write(u, firsts, updates)  # a view of what the layer holds
        return y

    def _advance(self, inputs: tuple[Tensor, ...], mask: Tensor | None, state: Tensor | None) -> Tensor:
        u, b, dt = inputs
        return delta_fold(u, self.gates(dt)[0], b, mask=mask, state=state)

    def mixing(self, hidden_states: Tensor, rec: Recurrence, angles: tuple[Tensor, Tensor] | None = None) -> Mixing:
        """See `llamba.kernels.delta.delta_matrix`; the values are those behind the convolution."""
        parts = self._project(hidden_states) | self._angles(angles, *hidden_states.shape[:2])
        _, keys, c = self._turned_heads(self._convolve(parts, rec, None)[0], parts)
        b, length = (value.repeat_interleave(c.shape[2] // value.shape[2], 2) for value in direction(keys))
        a, erase = self.gates(parts["dt"])
        own = Mixing(tuple(value.transpose(1, 2) for value in (a, b, c, erase, length[..., 0])), partial(_matrix_rows, rec))
        return own if self.sight is None else self._with_window(own, parts, rec)


def _matrix_rows(rec: Recurrence, inputs: Sequence[Tensor], rows: slice | Tensor) -> Tensor:
    a, b, c, erase, length = (value.transpose(1, 2) for value in inputs)
    return delta_matrix(a, b, c, erase, write=length, seq_idx=rec.seq_idx, mask=rec.mask, rows=rows)


class KimiDelta(GatedDelta):
    """Kimi Delta Attention (arXiv 2510.26692): as `GatedDelta`, with a decay for every key channel, made through `dt_rank` coordinates."""

    projects_steps = True

    @classmethod
    def defaults(cls, shape: dict[str, Any]) -> dict[str, Any]:
        """Decays through as many coordinates as a head is wide."""
        return super().defaults(shape) | {"dt_rank": shape["head_dim"]}

    def __init__(self, config: MixerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.dt_proj = nn.Linear(config.dt_rank, config.inner, bias=False)

    def decays(self) -> int:
        """One for every channel of every head's keys."""
        return self.config.inner

    def rows(self) -> dict[str, int]:
        """z | x | B | C | dt (low rank) | erase."""
        return super().rows() | {"dt": self.config.dt_rank}

    def _steps(self, rows: Tensor) -> Tensor:
        return self.dt_proj(rows)

    def decay(self, steps: Tensor) -> Tensor:
        """Log decays [..., H, N] from the raw steps, at least fp32."""
        step = F.softplus(at_least_fp32(steps) + at_least_fp32(self.dt_bias)).unflatten(-1, (self.config.heads, -1))
        return -at_least_fp32(self.A_log).exp()[:, None] * step

    def mixing(self, hidden_states: Tensor, rec: Recurrence, angles: tuple[Tensor, Tensor] | None = None) -> Mixing:
        """Raises ValueError: its decays differ between the channels of a head."""
        return Mixer.mixing(self, hidden_states, rec, angles)
