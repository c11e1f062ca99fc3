"""Matrix orientation: the student's mixing matrices towards the teacher's attention (MOHAWK, stage 1; arXiv 2408.10189, section 4.1).

Shapes: B batch, T time, D model width, H heads.
"""

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamba.data.batches import Batch
from llamba.data.tokens import StageData
from llamba.models.activations import CAPTURED, Scores, capture, capturing_attention
from llamba.models.hybrid import RECURRENT, mixer_layers
from llamba.models.loading import located
from llamba.models.mixers import Mixer, Mixing, NoMixer, Recurrence
from llamba.settings import Matrix
from llamba.stages.layerwise import LayerCalls, layer_calls, load_matching, target_mask, trained_in
from llamba.stages.shared import Pair, train_student
from llamba.training.layer_distances import Distances, Part, norm, one_graph_at_a_time, squared_distance
from llamba.training.learnable import train_only
from llamba.training.trainer import model_inputs
from llamba.training.wrapped_forward import run_as_forward

_ATTENTION_PARTS = ("q_", "k_")  # q_proj, k_proj and their norms, in every family


def objective(stage: Matrix, student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> Distances:
    """Distances of the layers with the student's mixer; a sequence counts as often as it has targets."""
    layers, every = mixer_layers(student.config), cast(Any, student.base_model.layers)
    heard = capture(teacher, model_inputs(batch), scores=layers)
    calls = layer_calls(student, heard.streams[0], batch)
    weight = target_mask(batch).sum(1)  # [B]
    parts = []
    for index in layers:
        layer = every[index]
        value = partial(_distance, stage, layer, heard.streams[index], heard.scores.pop(index), calls, index, weight)
        parts.append(Part(value, trained_in([layer])))
    total, values = one_graph_at_a_time(parts)
    return Distances(total / len(layers), dict(zip(layers, values, strict=True)), weight.sum())


def _distance(stage: Matrix, layer: Any, stream: Tensor, scores: Scores, calls: LayerCalls, index: int, weight: Tensor) -> Tensor:
    """Sum over sequences of weight x mean over heads of the distance, for a layer fed with the teacher's `stream` [B, T, D]."""

    def forward(hidden: Tensor) -> Tensor:
        mixing = _mixing(layer.self_attn, layer.input_layernorm(hidden), calls, index)
        squared = squared_distance(mixing, scores.mixing(calls.rec), stage.rows)  # [B, H]
        return ((squared if stage.squared else norm(squared)).mean(1) * weight).sum()

    distance: Tensor = run_as_forward(layer, layer, forward, calls.own(stream))
    return distance


def _mixing(mixer: nn.Module, hidden: Tensor, calls: LayerCalls, index: int) -> Mixing:
    made: list[Mixing] = []
    if not isinstance(mixer, Mixer):
        with capturing_attention(lambda module, scores: made.append(scores.mixing(calls.rec))):
            mixer(hidden_states=hidden, **calls.layers[index])
        return made[0]

    def forward(hidden: Tensor, rec: Recurrence) -> tuple[Tensor, ...]:
        made.append(mixer.mixing(hidden, rec, calls.layers[index].get("position_embeddings")))
        return made[0].inputs

    inputs = run_as_forward(mixer, mixer, forward, hidden, calls.rec)
    return made[0]._replace(inputs=inputs)


def _load(stage: Matrix, student: str, teacher: str) -> Pair:
    student_model, teacher_model = load_matching(stage, student, teacher)
    kinds = teacher_model.config.to_dict().get("layer_types") or []
    if unread := [index for index in mixer_layers(student_model.config) if RECURRENT in kinds[index : index + 1]]:
        raise ValueError(f"stage matrix reads the teacher's attention, and {teacher} has none in layers {unread}; name its own teacher")
    trained, every = set(), cast(Any, student_model.base_model.layers)
    for index in mixer_layers(student_model.config):
        mixer = every[index].self_attn
        if isinstance(mixer, Mixer) and type(mixer).mixing in (Mixer.mixing, NoMixer.mixing):
            mixer.mixing(torch.empty(0), Recurrence())  # raises the sentence that says what to do instead
        parts = mixer.matrix_parts if isinstance(mixer, Mixer) else _ATTENTION_PARTS
        trained |= {f"layers.{index}.self_attn.{name}" for name, _ in mixer.named_parameters() if name.startswith(parts)}
    train_only(student_model, trained)
    for model in (student_model, teacher_model):
        model.set_attn_implementation(CAPTURED)
    return student_model, teacher_model


def run(stage: Matrix, student: str, teacher: str, data: StageData, out: Path) -> dict[str, float]:
    """Align the mixing matrices of the model folder `student` with the attention of `teacher`, leaving the result in `out`.

    `out/metrics.jsonl` has each layer's distance. Raises ValueError for models that do not match, and for mixers without a matrix.
    """
    load = partial(_load, stage, student, located(stage.teacher or teacher))
    return train_student(stage, load, partial(objective, stage), data, out)
