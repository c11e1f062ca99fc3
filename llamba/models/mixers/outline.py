"""What a mixer is made of, what each kind says of itself, and the way of a sequence through it.

Shapes: B batch, T time, D model width, H query heads, G key/value heads, P head width, N state width, W convolution width.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamba.kernels.conv1d import causal_conv1d
from llamba.kernels.window import turned
from llamba.models.mixers.config import MixerConfig, sight_of
from llamba.models.mixers.parts import CausalConv, GatedHeadNorm, QKNorm
from llamba.models.tree import Tree

FP32_PARAMETERS = ("A_log", "D", "dt_bias", "erase_bias", "trap_bias", "theta_log", "rest_bias", "rest_growth")


class Recurrence(NamedTuple):
    """What a mixer receives as its `attention_mask`: real tokens [B, T] bool and document numbers [B, T]; None = all real, one document.

    `tree`, with a cache that records: the tokens are its last T nodes, and the nodes before those were read last.
    """

    mask: Tensor | None = None
    seq_idx: Tensor | None = None
    tree: Tree | None = None


class Mixing(NamedTuple):
    """A mixing matrix M (y = M x for each head) that is not written out.

    `rows(inputs, index)` gives the rows [B, H, I, T] of M that `index` (a slice or [I] integers) names, differentiable in the
    inputs. Every input is [B, H, ...], the part of one head of one sequence.
    """

    inputs: tuple[Tensor, ...]
    rows: Callable[[Sequence[Tensor], slice | Tensor], Tensor]


TAUGHT_ROWS = ("x", "B", "C")  # of in_proj, by name: the teacher's V, K and Q


class Outline(nn.Module):
    """The parts of a mixer and their use.

    Subclasses say how the rows of `in_proj` are laid out (`rows`), which of them the convolution covers (`conv_channels`), how
    its output becomes heads (`heads_of`), and the recurrence itself (`scan` over a sequence, `step` for one token).
    """

    matrix_parts: ClassVar[tuple[str, ...]] = ("in_proj", "conv1d", "dt_bias", "A_log", "D", "q_norm", "k_norm")  # what M depends on
    reads_heads: ClassVar[bool] = True  # B and C are whole key and query heads (N = P), which can be turned and seen through a window
    has_skip: ClassVar[bool] = True  # D
    erases: ClassVar[bool] = False  # by a gate with a bias of its own, `erase_bias`
    projects_steps: ClassVar[bool] = False  # from the dt rows, by `dt_proj`
    turns: ClassVar[bool] = False  # keys and queries by angles of its own
    dt_bias: nn.Parameter
    D: nn.Parameter
    A_log: nn.Parameter  # not in discrete Mamba-2
    erase_bias: nn.Parameter  # in the delta rules
    trap_bias: nn.Parameter  # in Mamba-3, as the next three
    theta_log: nn.Parameter
    B_bias: nn.Parameter
    C_bias: nn.Parameter
    dt_proj: nn.Linear  # in Mamba-1
    in_proj: nn.Linear
    conv1d: CausalConv
    out_proj: nn.Linear
    norm: GatedHeadNorm | None
    rest_bias: nn.Parameter  # of a mixer with a window, as the next two: of the rest's score,
    rest_growth: nn.Parameter  # its factor of the logarithm of how many tokens are out of sight,
    rest_mean: nn.Parameter  # and what the mean of their values counts
    join: nn.Parameter | None  # of a mixer with a window and without a norm: what the recurrence's channels count

    @classmethod
    def defaults(cls, shape: dict[str, Any]) -> dict[str, Any]:
        """The mixer's own values of its configuration for attention of this shape; a user's options come over them."""
        return {"state": shape["head_dim"]}

    def __init__(self, config: MixerConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.sight = sight_of(config, layer_idx)
        if (config.rotary or self.sight) and not (self.reads_heads and config.state == config.head_dim):
            raise ValueError(
                f"mixer.window, mixer.sinks and mixer.rotary need keys and queries of whole heads (state = head_dim = {config.head_dim}); "
                f"got {config.kind} with state {config.state}"
            )
        self.in_proj = nn.Linear(config.hidden_size, sum(self.layout().values()), bias=config.proj_bias)
        self.conv1d = CausalConv(self.conv_channels(), config.conv_width)
        self.out_proj = nn.Linear(config.inner, config.hidden_size, bias=config.out_bias)
        self.norm = GatedHeadNorm(config.inner, config.norm_eps) if config.out_norm else None
        self.join = nn.Parameter(torch.zeros(config.inner)) if self.sight and not config.out_norm else None
        if self.sight:
            self.rest_bias, self.rest_growth = (nn.Parameter(torch.zeros(config.heads)) for _ in range(2))
            self.rest_mean = nn.Parameter(torch.zeros(config.inner))
        if config.qk_norm is not None:
            self.q_norm = QKNorm(config.qk_norm, config.head_dim, config.qk_norm_eps)
            self.k_norm = QKNorm(config.qk_norm, config.head_dim, config.qk_norm_eps)

    @property
    def gain(self) -> tuple[str, nn.Parameter | None]:
        """What the recurrence's channels count behind the gate: the parameter's name, and itself where the mixer has it."""
        return ("join", self.join) if self.norm is None else ("norm.weight", self.norm.weight)

    def rows(self) -> dict[str, int]:
        """Rows of in_proj by name, in order; "x", "B" and "C" hold the teacher's V, K and Q."""
        raise NotImplementedError

    def layout(self) -> dict[str, int]:
        """`rows`, and beside a window "rest", one row for each head."""
        return self.rows() | ({"rest": self.config.heads} if self.sight else {})

    def taught_rows(self) -> tuple[int, int]:
        """The rows of in_proj that hold the teacher's, which stand next to each other: the first, and the one behind the last."""
        names, sizes = list(self.layout()), list(self.layout().values())
        places = [place for place, name in enumerate(names) if name in TAUGHT_ROWS]
        return sum(sizes[: places[0]]), sum(sizes[: places[-1] + 1])

    def conv_channels(self) -> int:
        """Channels of the convolution."""
        raise NotImplementedError

    def conv_rows(self) -> tuple[str, ...]:
        """Names of the in_proj rows that pass the convolution; they stand next to each other."""
        raise NotImplementedError

    def heads_of(self, conv_out: Tensor, rest: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x, B (both as the cache stores them) and C for every head, from the convolution's output and the other rows."""
        raise NotImplementedError

    def scan(self, x: Tensor, b: Tensor, c: Tensor | None, dt: Tensor, state: Tensor | None, rec: Recurrence) -> tuple[Tensor, Tensor]:
        """The recurrence over a sequence: output [B, T, H, P] and final state. c None: only the state is wanted."""
        raise NotImplementedError

    def step(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The recurrence for one token: inputs without the time axis, output [B, H, P] and next state."""
        raise NotImplementedError

    def mixing(self, hidden_states: Tensor, rec: Recurrence, angles: tuple[Tensor, Tensor] | None = None) -> Mixing:
        """The mixing matrix from x to y for inputs [B, T, D]; norm, gate and out_proj stand outside. What a window sees is added to it.

        `angles`: `position_embeddings` as `forward` takes them.

        Raises ValueError for a mixer that has no matrix per head.
        """
        raise ValueError(
            f"the matrix stage needs a mixer with one mixing matrix per head, got mixer={self.config.kind!r}, which mixes every channel in "
            "its own way; use the hidden stage, which aligns the mixer's output instead"
        )

    def _project(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """The rows of in_proj by name; those that pass the convolution stay together under "conv"."""
        merged: dict[str, int] = {}
        for name, count in self.layout().items():
            key = "conv" if name in self.conv_rows() else name
            merged[key] = merged.get(key, 0) + count
        parts = dict(zip(merged, self.in_proj(hidden_states).split_with_sizes(list(merged.values()), -1), strict=True))
        return parts if self.config.qk_norm is None else self._normalise(parts)

    def _split(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows by name, also those that pass the convolution."""
        together = self.conv_rows()
        return dict(zip(together, parts["conv"].split([self.rows()[name] for name in together], -1), strict=True)) | parts

    def _normalise(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's norms over the heads of B and C, wherever they stand."""
        together, rows = self.conv_rows(), self._split(parts)
        for name, norm in (("B", self.k_norm), ("C", self.q_norm)):
            rows[name] = norm(rows[name].unflatten(-1, (-1, len(norm.weight)))).flatten(-2)
        return rows | {"conv": torch.cat([rows[name] for name in together], -1)}

    def _conv_in(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["conv"]

    def _convolve(self, parts: dict[str, Tensor], rec: Recurrence, window: Tensor | None) -> tuple[Tensor, Tensor]:
        how = {"state": window, "seq_idx": rec.seq_idx, "mask": rec.mask}
        return self.conv1d(self._conv_in(parts), causal_conv1d, activation=self.config.conv_activation, **how)

    def _turned_heads(self, conv_out: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """`heads_of`, B and C turned by their positions where the mixer says so."""
        x, b, c = self.heads_of(conv_out, parts)
        if not self.config.rotary:
            return x, b, c
        cos, sin = parts["cos"], parts["sin"]
        return x, turned(b, cos, sin), turned(c, cos, sin)

    def _run(self, parts: dict[str, Tensor], rec: Recurrence, window: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output, state and convolution window after the tokens."""
        conv_out, window = self._convolve(parts, rec, window)
        x, b, c = self._turned_heads(conv_out, parts)
        y, state = self.scan(x, b, c, parts["dt"], state, rec)
        return y, state, window

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate and norm: [B, T, H, P], [B, T, H P] -> [B, T, H P]."""
        return self.norm(y, z) if self.norm is not None else y.flatten(-2) * F.silu(z)

    def _apply(self, fn, recurse: bool = True):
        """Casting a model to 16 bit leaves A_log, D and the step bias in fp32 (they decide the decay over thousands of tokens)."""
        wide = {name: value.data for name, value in self._parameters.items() if name in FP32_PARAMETERS and value is not None}
        super()._apply(fn, recurse)
        for name, old in wide.items():
            new = self.get_parameter(name)
            if new.dtype in (torch.bfloat16, torch.float16):
                new.data = old.to(new.device, torch.float32)
        return self
