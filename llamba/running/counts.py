"""Parameters of a conversion, counted on the meta device: needs neither weights nor network."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from llamba.models.convert import student_config
from llamba.models.families import family_of
from llamba.models.hybrid import mixer_layers
from llamba.models.mixers import ATTENTION, build_mixer


@dataclass(frozen=True)
class Counts:
    """Parameters: of the whole student, its mixers and MLPs, of the teacher, and of one converted layer, ours and published."""

    student: int
    mixers: int
    mlps: int
    teacher: int
    attention: int
    published: dict[str, int]
    own: dict[str, int]


def _published(config: PreTrainedConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters of one mixer by name: those of the published layout, and those that we add."""
    mixer = dict(config.mixer)
    with torch.device("meta"):
        rows = build_mixer(mixer, 0).layout()
        ours = {name: value.numel() for name, value in build_mixer(mixer, 0).named_parameters()}
    own: dict[str, int] = {}
    published = {f"in_proj[{name}]": count * mixer["hidden_size"] for name, count in rows.items()}
    published |= {name: count for name, count in ours.items() if not name.startswith("in_proj")}
    if "in_proj.bias" in ours:
        gate = mixer["heads"] * mixer["head_dim"] if mixer["kind"] == "discrete_mamba2" else 0
        if gate:
            published["gate bias"] = gate
        own["in_proj.bias"] = ours["in_proj.bias"] - gate
    if mixer["kind"] == "discrete_mamba2":
        own["dt_bias"] = published.pop("dt_bias")
    for name in [
        name for name in published if name.startswith(("q_norm", "k_norm", "join", "rest_", "in_proj[rest]")) or name == "out_proj.bias"
    ]:
        own[name] = published.pop(name)
    return published, own


def numel(model: torch.nn.Module) -> int:
    """Parameters of a model."""
    return sum(value.numel() for value in model.parameters())


def count(teacher: PreTrainedConfig, config: PreTrainedConfig) -> Counts:
    """Parameter counts of a conversion, on the meta device."""
    with torch.device("meta"):
        every = student_config(teacher, config.mixer["kind"], 1.0)
        whole, student = family_of(teacher).causal_lm(every), family_of(config).causal_lm(config)
    attention = numel(whole.model.layers[0].self_attn)
    mixers = sum(numel(student.model.layers[index].self_attn) for index in mixer_layers(config))
    mlps = sum(numel(layer.mlp) for layer in student.model.layers)
    if config.mixer["kind"] == ATTENTION:
        published = {name: value.numel() for name, value in whole.model.layers[0].self_attn.named_parameters()}
        return Counts(numel(student), mixers, mlps, numel(whole), attention, published, {})
    published, own = _published(config)
    return Counts(numel(student), mixers, mlps, numel(whole), attention, published, own)
