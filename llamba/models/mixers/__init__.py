"""The mixers that can stand where attention stood, by name; a new one is a file here and one entry."""

from typing import Any

from llamba.models.mixers.ablation import LowRank, NoMixer, Toeplitz
from llamba.models.mixers.base import Mixer, drop_window, without_recurrence
from llamba.models.mixers.config import AttentionWeights, MixerConfig
from llamba.models.mixers.delta import GatedDelta, KimiDelta
from llamba.models.mixers.initial import INITS, Origin, initialise
from llamba.models.mixers.mamba1 import Mamba1
from llamba.models.mixers.mamba2 import DiscreteMamba2, Mamba2
from llamba.models.mixers.mamba3 import Mamba3
from llamba.models.mixers.outline import Mixing, Recurrence

MIXERS: dict[str, type[Mixer]] = {
    "mamba1": Mamba1, "mamba2": Mamba2, "discrete_mamba2": DiscreteMamba2, "gated_delta": GatedDelta, "kda": KimiDelta,
    "mamba3": Mamba3, "low_rank": LowRank, "toeplitz": Toeplitz, "none": NoMixer,
}  # fmt: skip
AUTO = "auto"
BEST: tuple[str, dict[str, Any]] = ("mamba2", {"window": 64, "sinks": 4, "rotary": True, "conv_activation": None})  # what "auto" means
ATTENTION = "attention"  # the family's own attention once more, as the student's mixer


def mixer_config(kind: str, shape: dict[str, Any], **options: Any) -> MixerConfig:
    """The configuration of a mixer of this kind for attention of this shape (hidden_size, heads, groups, head_dim, ...).

    `kind` "auto" is the best that we know. `options` override single values.
    Raises ValueError for an unknown kind or option, and for an option that the kind cannot have.
    """
    kind, own = resolved(kind, options)
    unknown = set(options) - set(MixerConfig.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown mixer option {sorted(unknown)[0]!r}; known: {', '.join(MixerConfig.__dataclass_fields__)}")
    for name in ("window", "sinks", "rotary"):
        if options.get(name) and (kind == ATTENTION or not MIXERS[kind].reads_heads):
            able = [one for one, mixer in MIXERS.items() if mixer.reads_heads]
            raise ValueError(f"mixer.{name} is for mixers that read whole heads ({', '.join(able)}); got {options[name]!r} for {kind}")
    values = shape | {"angles": 0} | MIXERS.get(kind, Mixer).defaults(shape) | own
    if not values.get("window") and not values.get("sinks"):
        values["sliding_window"] = values["sliding_layers"] = None
    return MixerConfig(kind=kind, **values)


def resolved(kind: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The mixer and its options, where `kind` may be "auto". Raises ValueError for an unknown kind."""
    if kind == AUTO:
        return BEST[0], {**BEST[1], **options}
    if kind not in (*MIXERS, ATTENTION):
        raise ValueError(f"student.mixer must be one of {', '.join((AUTO, *MIXERS, ATTENTION))}; got {kind!r}")
    return kind, options


def build_mixer(config: dict[str, Any], layer_idx: int) -> Mixer:
    """The mixer described by a stored `config.mixer`, with uninitialised values."""
    made = MixerConfig(**config)
    return MIXERS[made.kind](made, layer_idx)


__all__ = [
    "ATTENTION", "AUTO", "BEST", "INITS", "MIXERS", "AttentionWeights", "Mixer", "MixerConfig", "Mixing", "NoMixer", "Origin",
    "Recurrence", "build_mixer", "drop_window", "initialise", "mixer_config", "resolved", "without_recurrence",
]  # fmt: skip
