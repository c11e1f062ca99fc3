"""A mixer's shape and variant, and the weights of attention that it takes.

Shapes: D model width, H query heads, G key/value heads, P head width, N state width, S pairs of coordinates that RoPE turns.
"""

from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_origin

from torch import Tensor

from llamba.kernels.window import Sight

NAMES: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", NoneType: "null"
}  # fmt: skip


@dataclass(frozen=True)
class MixerConfig:
    """Shape and variant of a mixer; the values are stored in the model's `config.mixer`.

    `kind` is a key of `llamba.models.mixers.MIXERS`. `state` is N (None: P for the Mamba-2 kinds, 16 for Mamba-1). `conv_activation`
    None leaves the convolution linear. `conv_after_repeat`, `double_dt_bias` and `block_gqa` reproduce published weights: the
    convolution behind the GQA repeat, the step bias added twice, and key/value heads expanded in blocks of N coordinates.
    `layers` lists the layers of a student whose mixer is attention again; `layer_types` cannot tell them.
    Beside the recurrence, softmax attention reads the last `window` tokens (the token itself included) and the first `sinks` ones of
    the document; in the layers `sliding_layers` nothing `sliding_window` tokens back or further, as there in the teacher. `rotary`: the
    recurrence reads and writes by keys and queries that are turned by their positions. Mamba-3 turns `angles` pairs of coordinates by
    angles of its own, and its rate of decay is at least `rate_floor`.
    """

    kind: str
    hidden_size: int
    heads: int
    groups: int
    head_dim: int
    state: int
    conv_width: int = 4
    conv_activation: str | None = "silu"
    out_norm: bool = False
    norm_eps: float = 1e-5
    proj_bias: bool = True
    out_bias: bool = False
    qk_norm: str | None = None
    qk_norm_eps: float = 1e-6
    dt_rank: int = 0
    conv_after_repeat: bool = False
    double_dt_bias: bool = False
    block_gqa: bool = False
    layers: list[int] | None = None
    window: int = 0
    sinks: int = 0
    rotary: bool = False
    sliding_window: int | None = None
    sliding_layers: list[int] | None = None
    angles: int = 0
    rate_floor: float = 0.0

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("window", "sinks"):
            if getattr(self, name) < 0:
                raise ValueError(f"mixer.{name} must be at least 0; got {getattr(self, name)}")
        if self.sinks and not self.window:
            object.__setattr__(self, "window", 1)  # a token sees itself
        if self.groups < 1 or self.heads % self.groups:
            raise ValueError(f"mixer.heads must be a multiple of mixer.groups; got {self.heads} heads and {self.groups} groups")
        if self.conv_activation not in ("silu", None):
            raise ValueError(f'mixer.conv_activation must be "silu" or null; got {self.conv_activation!r}')
        if self.qk_norm not in ("rms", "layer", None):
            raise ValueError(f'mixer.qk_norm must be "rms", "layer" or null; got {self.qk_norm!r}')
        if self.conv_width < 1:
            raise ValueError(f"mixer.conv_width must be at least 1; got {self.conv_width}")

    def stored(self) -> dict[str, Any]:
        """The values as `config.mixer` has them: of the options beside the recurrence, those that are on."""
        beside = ("window", "sinks", "rotary", "sliding_window", "sliding_layers")
        return {name: value for name, value in vars(self).items() if value or name not in beside}

    @property
    def inner(self) -> int:
        """Width of the mixer's output before out_proj, H * P."""
        return self.heads * self.head_dim

    @property
    def shared(self) -> int:
        """Width of x (and of B where N = P) before the GQA repeat, G * P."""
        return self.groups * self.head_dim


def _check_types(config: MixerConfig) -> None:
    for entry in fields(config):
        value, kinds = getattr(config, entry.name), [get_origin(kind) or kind for kind in get_args(entry.type) or (entry.type,)]
        if type(value) not in (*kinds, *((int,) if float in kinds else ())):
            needed = " or ".join(NAMES[kind] for kind in kinds)
            raise ValueError(f"mixer.{entry.name} must be {needed}; got {value!r}")


@dataclass
class AttentionWeights:
    """What a mixer takes from attention. Weights as `nn.Linear` stores them: q [H P, D], k and v [G P, D], o [D, H P]."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    frequencies: Tensor | None = None  # radians a token by which RoPE turns the coordinates i and i + S [S]
    norms: dict[str, Tensor] = field(default_factory=dict)  # "q_norm.weight", "k_norm.weight" and, for LayerNorm, the biases


def sight_of(config: MixerConfig, layer: int) -> Sight | None:
    """What the mixer of a layer sees beside its recurrence; None: nothing."""
    if not config.window:
        return None
    reach = config.sliding_window if layer in (config.sliding_layers or ()) else None
    return Sight(config.window if reach is None else min(config.window, reach), config.sinks, reach)
