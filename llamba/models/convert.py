"""Conversion: a teacher (or a student that has attention left) becomes a student with mixers in more of its layers.

Nothing is trained here. Every weight that is not in a newly converted layer is copied as it is, so the first conversion and each
further one of a progressive run are the same function.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llamba.models.calibrate import Rows, calibrated, check_rows
from llamba.models.families import Family, family_of
from llamba.models.gate import open_by, open_directions
from llamba.models.hybrid import RECURRENT, mixer_layers
from llamba.models.loading import load_config, load_model
from llamba.models.mixers import ATTENTION, AUTO, INITS, MixerConfig, Origin, build_mixer, initialise, mixer_config
from llamba.models.offloaded import CPU, all_weights, is_offloaded, present

Attention = float | Sequence[int]
MIXERS_WITH_GATE = ("mamba1", "mamba2", "discrete_mamba2")


@dataclass
class Conversion:
    """What a conversion did: for each newly converted layer, where every tensor came from; and which layers keep attention."""

    kept: list[int]
    layers: dict[int, list[Origin]]

    def to_json(self) -> dict[str, Any]:
        """As plain lists and dicts, for a JSON file."""
        return {"attention_layers": self.kept, "converted": {str(i): [o._asdict() for o in rows] for i, rows in self.layers.items()}}

    def __str__(self) -> str:
        """One line per tensor; layers that were converted alike share a block."""
        blocks: dict[tuple[Origin, ...], list[int]] = {}
        for layer, rows in self.layers.items():
            blocks.setdefault(tuple(rows), []).append(layer)
        lines = [f"attention kept in layers {_listing(self.kept)}"]
        for origins, layers in blocks.items():
            lines.append(f"converted layers {_listing(layers)}")
            lines += [f"  {o.tensor:<20} {str(list(o.shape)):<16} <- {o.source}" for o in origins]
        return "\n".join(lines)


def _listing(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def kept_layers(attention: Attention, layers: int) -> list[int]:
    """Indices of the layers that keep attention.

    A fraction keeps, of each block of 1 / fraction layers, the last (Mamba-in-Llama: 1, 3, ... for 1/2; 3, 7, ... for 1/4), so that
    1/2, 1/4 and 1/8 nest. A list is taken as it is. Raises ValueError outside 0 .. 1, or for an index that is no layer.
    """
    if isinstance(attention, bool) or not isinstance(attention, (int, float, Sequence)) or isinstance(attention, str):
        raise ValueError(f"student.attention must be a fraction from 0 to 1 or a list of layer indices; got {attention!r}")
    if isinstance(attention, Sequence):
        wrong = [i for i in attention if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < layers]
        if wrong or len(set(attention)) != len(attention):
            raise ValueError(f"student.attention must list different layer indices from 0 to {layers - 1}; got {list(attention)}")
        return sorted(attention)
    if not 0 <= attention <= 1:
        raise ValueError(f"student.attention must be a fraction from 0 to 1 or a list of layer indices; got {attention}")
    share = Fraction(attention).limit_denominator(1000)
    return [i for i in range(layers) if (i + 1) * share // 1 > i * share // 1]


def student_config(teacher: PreTrainedConfig, mixer: str, attention: Attention, options: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The student's configuration; needs no weights. `options` override single values of the mixer's configuration.

    A teacher that is a student already stays as it is with `attention=1`. Raises ValueError for an unsupported family, or
    where a layer that has the student's mixer already should keep attention.
    """
    family = family_of(teacher)
    values = teacher.to_dict()
    kept = kept_layers(attention, teacher.num_hidden_layers)
    if mixer == AUTO and values.get("mixer"):
        mixer = values["mixer"]["kind"]
    if attention == 1 and mixer_layers(teacher):  # a student already, and no layer of it is to be converted further
        kept, mixer = [i for i in kept if i not in mixer_layers(teacher)], values["mixer"]["kind"]
    plain = "full_attention" if values.get("sliding_window") is None else "sliding_attention"
    types = list(values.get("layer_types") or [plain] * teacher.num_hidden_layers)
    lost = [i for i in kept if i in mixer_layers(teacher)]
    if lost:
        raise ValueError(f"student.attention keeps layers {_listing(lost)}, but they are recurrent in this model already; name others")
    values["layer_types"] = [kind if i in kept or mixer == ATTENTION else RECURRENT for i, kind in enumerate(types)]
    values["mixer"] = _mixer_config(family, teacher, mixer, options or {}).stored()
    if mixer == ATTENTION:
        values["mixer"]["layers"] = [i for i in range(teacher.num_hidden_layers) if i not in kept]
    for key in ("model_type", "architectures", "_name_or_path", "auto_map", "transformers_version", "quantization_config"):
        values.pop(key, None)
    return family.config(**values, architectures=[family.causal_lm.__name__])


def _mixer_config(family: Family, teacher: PreTrainedConfig, mixer: str, options: dict[str, Any]) -> MixerConfig:
    stored = teacher.to_dict().get("mixer")
    if not stored:
        return mixer_config(mixer, family.shape(teacher), **options)
    own = MixerConfig(**stored)
    if own.kind != mixer or any(vars(own).get(name) != value for name, value in options.items()):
        raise ValueError(f"student.mixer must stay what the model has ({own.kind}); got {mixer} with options {options}")
    return own


def require_teacher(name: str) -> PreTrainedConfig:
    """The configuration of a model that can be converted. Raises ValueError for one of another family, and for a quantised one."""
    config = load_config(name)
    family_of(config)
    if quantised := config.to_dict().get("quantization_config"):
        method = quantised.get("quant_method")
        raise ValueError(f"teacher: plain weights are needed, and {name} is quantised ({method}); name the model that it was made from")
    return config


def load_teacher(name: str) -> PreTrainedModel:
    """The model as it is stored (its own dtype). Raises ValueError as `require_teacher` and `load_model`."""
    require_teacher(name)
    teacher: PreTrainedModel = load_model(name)
    return teacher


def convert(
    teacher: str | PreTrainedModel,
    *,
    mixer: str = "auto",
    attention: Attention = 0.5,
    init: str = "attention",
    seed: int = 0,
    options: dict[str, Any] | None = None,
    calibrate: Rows | None = None,
) -> Any:
    """Replace attention by mixers that start from its weights; returns the student (with `.conversion`), in eval mode.

    `teacher` is a checkpoint folder or hub name, or a loaded model (which stays as it is; nothing is shared with it; of one that is
    offloaded or spread over devices the student is on the CPU). `mixer`:
    "auto" (the best that we know: `llamba.models.mixers.BEST`; a student's own, where `teacher` is one), "mamba1", "mamba2",
    "discrete_mamba2", "gated_delta", "kda" or "mamba3"; for ablations "low_rank", "toeplitz", "none", or "attention", which with `init`
    "random" learns attention anew (MOHAWK's Phi to Phi) and with "attention" is the teacher's. `attention`: the fraction of layers
    that keep attention, or their indices. `init`: a key of `llamba.models.mixers.INITS`. `options`: values of the mixer's configuration,
    e.g. {"window": 64, "sinks": 4, "rotary": True}; with {"proj_bias": False}, which llama.cpp needs, the teacher makes up a short text
    on which the gate is opened. `calibrate`: rows of token ids, some thousand in all, on which what stands for all that a window does not
    see is fitted to the teacher's attention, and without a window out_proj, too (see `llamba.models.calibrate`); without them the former
    has a low score.
    Source: Mamba-in-Llama, Algorithm 1.

    Raises ValueError for arguments out of range, an unsupported family, or a teacher that cannot be loaded or
    has weights without values.
    """
    if isinstance(teacher, str):  # say what is wrong with the arguments before reading gigabytes
        student_config(load_config(teacher), mixer, attention, options)
    source = load_teacher(teacher) if isinstance(teacher, str) else teacher
    if calibrate is not None:
        check_rows(calibrate, source.config, mixer)
    config = student_config(source.config, mixer, attention, options)
    family = family_of(config)
    with init_empty_weights():
        student = family.causal_lm(config)
    generator, home = torch.Generator().manual_seed(seed), _home(source)
    record: dict[int, list[Origin]] = {}
    new = sorted(set(mixer_layers(config)) - set(mixer_layers(source.config)))
    gates = open_directions(source, new, generator, home) if _needs_directions(config, init) else {}
    for index in new:
        attention_module, place = _layers(source)[index].self_attn, _layers(student)[index]
        if mixer == ATTENTION:
            place.self_attn.to_empty(device=home).to(source.dtype)
            with present(attention_module):
                record[index] = _attention_anew(place.self_attn, attention_module, init, config.initializer_range, generator)
        else:
            with torch.random.fork_rng(devices=[]):  # what modules draw at first is set anew
                made = build_mixer(config.mixer, index).to(source.dtype)
            weights = family.read(attention_module)
            weights.frequencies = _frequencies(source)
            record[index] = initialise(made, weights, init, generator)
            if index in gates:
                record[index] = open_by(made, gates[index], record[index])
            place.self_attn = made.to(home)
    _copy_rest(source, student, home, share=isinstance(teacher, str))
    student.generation_config = copy.deepcopy(source.generation_config)
    if calibrate is not None:
        record |= calibrated(source, student, record, calibrate)
    student.conversion = Conversion([i for i in range(config.num_hidden_layers) if i not in mixer_layers(config)], record)
    return student.eval()


def _needs_directions(config: PreTrainedConfig, init: str) -> bool:
    """Whether the gate should start open and has no bias that could open it."""
    mixer = config.to_dict()["mixer"]
    return mixer["kind"] in MIXERS_WITH_GATE and not mixer["proj_bias"] and init in INITS and INITS[init].open_gate


@torch.no_grad()
def _attention_anew(made: nn.Module, source: nn.Module, init: str, spread: float, generator: torch.Generator) -> list[Origin]:
    """Fill attention that is the student's mixer: from the teacher's ("attention"), or with the family's random start."""
    known = ["attention", *(name for name, rule in INITS.items() if not rule.copy_attention)]
    if init not in known:
        raise ValueError(f"student.init must be one of {', '.join(known)} where student.mixer is 'attention'; got {init!r}")
    own, origins = dict(source.named_parameters()), []
    for name, weight in made.named_parameters():
        if init == "attention":
            weight.copy_(own[name])
        elif weight.ndim > 1:
            weight.copy_(torch.empty_like(weight, dtype=torch.float32, device="cpu").normal_(0, spread, generator=generator))
        else:
            weight.fill_(0 if name.endswith("bias") else 1)
        origins.append(Origin(name, tuple(weight.shape), name if init == "attention" else "new: random" if weight.ndim > 1 else "new"))
    return origins


def _home(source: PreTrainedModel) -> torch.device:
    """Where the student goes: to its teacher, or to the CPU where that is spread over devices or offloaded."""
    devices = {parameter.device for parameter in source.parameters()}
    return devices.pop() if len(devices) == 1 and not is_offloaded(source) else CPU


def _layers(model: Any) -> Any:
    return model.base_model.layers


def _frequencies(model: Any) -> torch.Tensor:
    return model.base_model.rotary_emb.inv_freq


def _copy_rest(source: PreTrainedModel, student: PreTrainedModel, home: torch.device, share: bool) -> None:
    """Give the student every tensor of the source that it has a place for, under the same name."""
    places = {name for name, value in student.state_dict().items() if value.is_meta}
    values = {name: value.to(home, copy=not share) for name, value in all_weights(source).items() if name in places}
    student.load_state_dict(values, strict=False, assign=True)
    student.tie_weights()
    empty = [name for name, value in student.named_parameters() if value.is_meta]
    assert not empty, f"conversion left {empty} without values"
    for parameter in student.parameters():
        parameter.requires_grad_(True)
