"""Which of a student's weights learn in a stage, and at which rate."""

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from llamba.models.hybrid import mixer_layers
from llamba.models.mixers import Mixer
from llamba.settings import Training

PROJECTION = re.compile(r"\.self_attn\.(in|out)_proj\.(weight|bias)$")
TAUGHT = re.compile(r"\.self_attn\.([qkvo]_proj|dense|out_proj|q_(layer)?norm|k_(layer)?norm)\.")  # whole, what attention had, too


def mixer_names(student: PreTrainedModel) -> set[str]:
    """Names of the parameters of converted layers' mixers."""
    converted = tuple(f"layers.{number}.self_attn." for number in mixer_layers(student.config))
    return {name for name, _ in student.named_parameters() if converted and name.partition(".")[2].startswith(converted)}


def join_names(student: PreTrainedModel) -> set[str]:
    """Names of the weights by which recurrences count beside what windows and sinks see: those that start at 0, or far below it."""
    beside = [(place, module) for place, module in student.named_modules() if isinstance(module, Mixer) and module.sight is not None]
    return {f"{place}.{name}" for place, module in beside for name in (module.gain[0], "rest_bias")}


def is_new(name: str) -> bool:
    """Whether the teacher has nothing of a mixer's parameter of this name, or (in_proj) has some rows alone."""
    return not TAUGHT.search(name)


def hold_taught_rows(student: PreTrainedModel) -> None:
    """Let no gradient reach the rows of in_proj that hold the teacher's values, keys and queries, for as long as the model lives.

    Raises ValueError for a student without them.
    """
    mixers = [module for module in student.modules() if isinstance(module, Mixer) and module.rows()]
    if not mixers:
        raise ValueError(
            "train='new' needs a student with mixers that are not attention and have weights, got one without; use train='mixers' or 'all'"
        )
    for mixer in mixers:
        mixer.in_proj.__dict__["forward"] = partial(_held, mixer.in_proj, *mixer.taught_rows())


def _held(linear: nn.Linear, first: int, after: int, inputs: Tensor) -> Tensor:
    """The layer's own output, whose rows from `first` to before `after` do not learn; what is asked for them alone is not computed."""
    weight, bias = linear.weight, linear.bias
    new = [torch.cat((part[:first], part[after:])) for part in (weight, bias) if part is not None]
    before, behind = F.linear(inputs, *new).tensor_split((first,), -1)
    taught = F.linear(inputs, *(part[first:after].detach() for part in (weight, bias) if part is not None))
    return torch.cat((before, taught, behind), -1)


def freeze(student: PreTrainedModel, train: str) -> None:
    """Leave trainable what `train` names: "mixers" (of the converted layers), "new" (of them, what the teacher does not have; see
    `hold_taught_rows`), "all", or "all_but_mlps".

    Raises ValueError where mixers are to be trained and the student has none that can be.
    """
    if train == "new":
        hold_taught_rows(student)
    mixers = {name for name in mixer_names(student) if train != "new" or is_new(name)}
    if train == "mixers" and not mixers:
        raise ValueError(
            "train='mixers' needs a student whose mixers have weights, got one that is all attention (or none); use train='all'"
        )
    for name, weight in student.named_parameters():
        weight.requires_grad_(name in mixers if train in ("mixers", "new") else train == "all" or ".mlp." not in name)


def train_only(student: PreTrainedModel, names: set[str]) -> None:
    """Leave trainable only the base model's parameters of these names. Raises ValueError where there are none."""
    if not names:
        raise ValueError(f"nothing to train: the mixer {student.config.mixer['kind']!r} has no weights; leave the stage out")
    for weight in student.parameters():
        weight.requires_grad_(False)
    for name in names:
        student.base_model.get_parameter(name).requires_grad_(True)


def other_rates(student: PreTrainedModel, stage: Training) -> dict[str, float]:
    """Learning rates, by parameter, of what does not learn at the stage's `lr`: mixers' projections and joins, and all but the mixers."""
    mixers, joins = mixer_names(student), join_names(student)

    def rate(name: str) -> float | None:
        if name not in mixers:
            return stage.rest_lr
        if name in joins:
            return stage.join_lr
        return stage.projection_lr if PROJECTION.search(name) else None

    rates = {name: rate(name) for name, _ in student.named_parameters()}
    return {name: value for name, value in rates.items() if value is not None}


def by_rate(group: dict[str, Any], rates: dict[int, float]) -> list[dict[str, Any]]:
    """An optimizer's group as one for each learning rate; weights that `rates` does not name keep the group's."""
    parts: dict[float, list[Tensor]] = {}
    for weight in group["params"]:
        parts.setdefault(rates.get(id(weight), group["lr"]), []).append(weight)
    return [{**group, "params": weights, "lr": rate} for rate, weights in parts.items()]
