"""Mixers for the papers' ablations; small and slow is fine here.

Shapes: B batch, T time, L tokens of the past, I rows asked for, D model width, H query heads, G key/value heads, P head width.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llamba.kernels.common import documents, traced
from llamba.models.cache import RecurrentLayer
from llamba.models.mixers.base import Mixer
from llamba.models.mixers.config import MixerConfig
from llamba.models.mixers.mamba2 import Mamba2
from llamba.models.mixers.outline import Mixing, Recurrence
from llamba.models.mixers.parts import at_least_fp32
from llamba.models.tree import Tree

ROWS_AT_ONCE = 256  # of a Toeplitz matrix


class NoMixer(Mixer):
    """Nothing: the layer keeps its MLP alone (Mamba-in-Llama, arXiv 2408.15237, Table 9)."""

    reads_heads = False

    @classmethod
    def defaults(cls, shape: dict[str, Any]) -> dict[str, Any]:
        """No queries and keys, no norms of them."""
        return super().defaults(shape) | {"qk_norm": None}

    def __init__(self, config: MixerConfig, layer_idx: int):
        nn.Module.__init__(self)
        self.config, self.layer_idx, self.sight = config, layer_idx, None

    def rows(self) -> dict[str, int]:
        """None."""
        return {}

    def forward(
        self, hidden_states: Tensor, attention_mask: Recurrence | None = None, past_key_values=None, position_embeddings=None, **kwargs
    ) -> tuple[Tensor, None]:
        """Zeros [B, T, D]; a cache learns how many tokens there were."""
        if past_key_values is not None:
            nothing = hidden_states.new_zeros(*hidden_states.shape[:2], 0)
            self._cached_run({"conv": nothing}, attention_mask or Recurrence(), past_key_values.layers[self.layer_idx])
        return hidden_states * 0, None  # so that what feeds a mixer has a gradient, as wrappers expect of every trained weight

    def _run(self, parts: dict[str, Tensor], rec: Recurrence, window: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        nothing = parts["conv"]
        return nothing, nothing.new_zeros(nothing.shape[0], 0), nothing.new_zeros(nothing.shape[0], self.config.conv_width - 1, 0)

    def _held_run(self, parts: dict[str, Tensor], layer: RecurrentLayer, tree: Tree | None) -> Tensor:
        layer.append_conv(parts["conv"], self._advance, self.fold_after)
        layer.append_inputs((parts["conv"],))
        return parts["conv"]

    def _advance(self, inputs: tuple[Tensor, ...], mask: Tensor | None, state: Tensor | None) -> Tensor:
        return inputs[0].new_zeros(inputs[0].shape[0], 0)

    def mixing(self, hidden_states: Tensor, rec: Recurrence, angles: tuple[Tensor, Tensor] | None = None) -> Mixing:
        """Raises ValueError: there is no matrix."""
        raise ValueError("the matrix stage needs a mixer with a mixing matrix, got mixer='none', which has none; leave the stage out")


class LowRank(Mamba2):
    """Causal low-rank mixing tril(C B^T) that depends on the input (MOHAWK, arXiv 2408.10189, Table 4): an SSD that never forgets."""

    has_rate = False

    @classmethod
    def defaults(cls, shape: dict[str, Any]) -> dict[str, Any]:
        """A linear convolution, no norm."""
        return super().defaults(shape) | {"out_norm": False, "conv_activation": None}

    def __init__(self, config: MixerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.dt_bias

    def rows(self) -> dict[str, int]:
        """z | x | B | C."""
        return {name: count for name, count in super().rows().items() if name != "dt"}

    def _project(self, hidden_states: Tensor) -> dict[str, Tensor]:
        return super()._project(hidden_states) | {"dt": hidden_states.new_zeros(*hidden_states.shape[:2], self.config.heads)}

    def factors(self, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        """No decay, write strength 1 (None)."""
        return torch.zeros_like(at_least_fp32(dt)), None


class Toeplitz(Mixer):
    """Causal Toeplitz mixing that depends on the input (MOHAWK, Table 4): y_i = sum_j k_(i-j) x_j + D x_i with k_m from token m.

    The state of a sequence is all of its past, [B, L, 1 + H + G P]: whether the slot holds a token, its k and its x.
    """

    matrix_parts = ("in_proj", "D")
    reads_heads = False

    @classmethod
    def defaults(cls, shape: dict[str, Any]) -> dict[str, Any]:
        """No queries and keys, no norms of them; nothing behind its convolution."""
        return super().defaults(shape) | {"qk_norm": None, "conv_activation": None}

    def __init__(self, config: MixerConfig, layer_idx: int):
        if config.conv_after_repeat:
            raise ValueError("toeplitz needs mixer.conv_after_repeat=false: nothing was published with it; got true")
        super().__init__(config, layer_idx)
        self.D = nn.Parameter(torch.zeros(config.heads))

    def rows(self) -> dict[str, int]:
        """z | x | kernel; the teacher's Q and K have no place."""
        return {"z": self.config.inner, "x": self.config.shared, "kernel": self.config.heads}

    def conv_channels(self) -> int:
        """x alone."""
        return self.config.shared

    def conv_rows(self) -> tuple[str, ...]:
        """Only x passes the convolution."""
        return ("x",)

    def _project(self, hidden_states: Tensor) -> dict[str, Tensor]:
        parts = super()._project(hidden_states)
        return parts | {"dt": parts.pop("kernel")}

    def heads_of(self, conv_out: Tensor, rest: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., G, P]; no B and no C."""
        return conv_out.unflatten(-1, (-1, self.config.head_dim)), conv_out[..., :0], conv_out[..., :0]

    def scan(self, x: Tensor, b: Tensor, c: Tensor | None, dt: Tensor, state: Tensor | None, rec: Recurrence) -> tuple[Tensor, Tensor]:
        """The product with the Toeplitz matrix in blocks of rows, and the past with these tokens added."""
        (B, T, G, P), H = x.shape, self.config.heads
        real = torch.ones(B, T, dtype=torch.bool, device=x.device) if rec.mask is None else rec.mask
        held = torch.cat((real[..., None], at_least_fp32(dt), at_least_fp32(x).flatten(-2)), -1)  # [B, T, 1 + H + G P]
        past = held[:, :0] if state is None else state
        held, L = torch.cat((past, held), 1), past.shape[1]
        mask, seq_idx = held[..., 0] > 0, None if rec.seq_idx is None else nn.functional.pad(rec.seq_idx, (L, 0))
        docs = documents(seq_idx, mask)
        after = held if docs is None else torch.cat((held[..., :1] * (docs == docs[:, -1:])[..., None], held[..., 1:]), -1)
        if c is None:
            return x.new_zeros(B, T, H, P), after
        kernel = held[..., 1 : 1 + H].transpose(1, 2)  # [B, H, L + T]
        values = held[..., 1 + H :].unflatten(-1, (G, P)).repeat_interleave(H // G, 2).transpose(1, 2)  # [B, H, L + T, P]
        blocks = [slice(L, L + T)]
        if not traced(T):
            blocks = [slice(first, min(first + ROWS_AT_ONCE, L + T)) for first in range(L, L + T, ROWS_AT_ONCE)]
        y = torch.cat([toeplitz_rows(kernel, docs, mask, rows) @ values for rows in blocks], 2)
        y = (y + at_least_fp32(self.D)[:, None, None] * values[:, :, L:]) * real[:, None, :, None]
        return y.transpose(1, 2).to(x.dtype), after

    def step(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token, by `scan`."""
        y, state = self.scan(x[:, None], b, c, dt[:, None], state, Recurrence())
        return y[:, 0], state

    def mixing(self, hidden_states: Tensor, rec: Recurrence, angles: tuple[Tensor, Tensor] | None = None) -> Mixing:
        """From the kernel [B, H, T] and D [B, H]."""
        kernel = at_least_fp32(self._project(hidden_states)["dt"]).transpose(1, 2)
        mask = torch.ones_like(kernel[:, 0], dtype=torch.bool) if rec.mask is None else rec.mask
        skip = at_least_fp32(self.D).expand(len(kernel), -1)
        return Mixing((kernel, skip), partial(_rows_with_skip, documents(rec.seq_idx, mask), mask))


def _rows_with_skip(docs: Tensor | None, mask: Tensor, inputs: Sequence[Tensor], rows: slice | Tensor) -> Tensor:
    kernel, skip = inputs
    index = torch.arange(mask.shape[1], device=mask.device)
    own = (index[rows][:, None] == index) & mask[:, None]  # [B, I, T]
    return toeplitz_rows(kernel, docs, mask, rows) + skip[:, :, None, None] * own[:, None]


def toeplitz_rows(kernel: Tensor, docs: Tensor | None, mask: Tensor, rows: slice | Tensor) -> Tensor:
    """Rows [B, H, I, T] of the causal matrix with k_(i-j) at (i, j), tokens counted within their document.

    kernel [B, H, T]; docs [B, T] document numbers, an absent token having that of the token before; mask [B, T] True = real.
    """
    rank = mask.long().cumsum(1) - 1  # [B, T] the how-manieth real token
    kernel = kernel.gather(2, mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, None].expand_as(kernel))  # by rank
    start = torch.zeros_like(rank)
    seen = mask[:, None] & mask[:, rows, None]  # [B, I, T]
    if docs is not None:
        begins = nn.functional.pad(docs[:, 1:] != docs[:, :-1], (1, 0))
        start = torch.where(begins, rank, 0).cummax(1).values
        seen = seen & (docs[:, None] == docs[:, rows, None])
    gap = rank[:, rows, None] - rank[:, None]  # [B, I, T]
    seen = seen & (gap >= 0)
    place = (start[:, rows, None] + gap).clamp(0, kernel.shape[2] - 1).flatten(1)  # [B, I T]
    made = kernel.gather(2, place[:, None].expand(-1, kernel.shape[1], -1)).unflatten(2, gap.shape[1:])
    return made.masked_fill(~seen[:, None], 0)
