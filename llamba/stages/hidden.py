"""Hidden-state alignment: what each converted layer makes of the teacher's hidden states (MOHAWK, stage 2; arXiv 2408.10189, 4.2).

Shapes: B batch, T time, D model width.
"""

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamba.data.batches import Batch
from llamba.data.tokens import StageData
from llamba.models.activations import capture
from llamba.models.documents import by_document
from llamba.models.hybrid import mixer_layers
from llamba.models.loading import located
from llamba.models.mixers.parts import at_least_fp32
from llamba.settings import Hidden
from llamba.stages.layerwise import LayerCalls, layer_calls, load_matching, target_mask, trained_in
from llamba.stages.shared import Pair, train_student
from llamba.training.layer_distances import Distances, Part, one_graph_at_a_time
from llamba.training.learnable import hold_taught_rows, is_new, train_only
from llamba.training.trainer import model_inputs
from llamba.training.wrapped_forward import run_as_forward


def objective(stage: Hidden, student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> Distances:
    """Sums over target tokens of |student - teacher| for each converted layer; the last block's target is before the final norm."""
    layers, every = mixer_layers(student.config), cast(Any, student.base_model.layers)
    inputs: dict[str, Any] = {**model_inputs(batch), **by_document(teacher, batch)}
    heard = capture(teacher, inputs, mixed=layers if stage.target == "mixer" else ())
    calls, chosen = layer_calls(student, heard.streams[0], batch), target_mask(batch)
    parts = []
    for index in layers:
        after = min(index + stage.ahead, len(every))
        target = heard.mixed.pop(index) if stage.target == "mixer" else heard.streams[after]
        run_through = [every[place] for place in range(index, after)]
        value = partial(_distance, stage, run_through, heard.streams[index], target, calls, index, chosen)
        parts.append(Part(value, trained_in(run_through)))
    total, values = one_graph_at_a_time(parts)
    return Distances(total / len(layers), dict(zip(layers, values, strict=True)), chosen.sum())


def _distance(stage: Hidden, layers: Any, stream: Tensor, target: Tensor, calls: LayerCalls, first: int, chosen: Tensor) -> Tensor:
    """Sum over the chosen tokens of the L2 distance to `target` [B, T, D], for layers fed with the teacher's `stream` [B, T, D]."""
    hidden = calls.own(stream)
    if stage.target == "mixer":
        hidden = run_as_forward(layers[0], layers[0], partial(_mixer_output, layers[0], calls.layers[first]), hidden)
    else:
        for place, layer in enumerate(layers):
            hidden = layer(hidden, **calls.layers[first + place])
    gap = at_least_fp32(hidden)[chosen] - at_least_fp32(target)[chosen]  # [n, D]
    return torch.linalg.vector_norm(gap, dim=-1).sum()


def _mixer_output(layer: Any, call: dict[str, Any], hidden: Tensor) -> Tensor:
    mixed: Tensor = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **call)[0]
    return mixed


def _load(stage: Hidden, student: str, teacher: str) -> Pair:
    student_model, teacher_model = load_matching(stage, student, teacher)
    inner = "self_attn." if stage.train in ("mixers", "new") else ""
    prefixes = tuple(f"layers.{index}.{inner}" for index in mixer_layers(student_model.config))
    names = {name for name, _ in student_model.base_model.named_parameters() if name.startswith(prefixes)}
    if stage.train == "new":
        hold_taught_rows(student_model)
        names = {name for name in names if is_new(name)}
    train_only(student_model, {name for name in names if stage.train != "all_but_mlps" or ".mlp." not in name})
    return student_model, teacher_model


def run(stage: Hidden, student: str, teacher: str, data: StageData, out: Path) -> dict[str, float]:
    """Align the layers of the model folder `student` with those of `teacher`, leaving the result in `out`; see `train_student`.

    `out/metrics.jsonl` has each layer's distance. Raises ValueError for models that do not match.
    """
    load = partial(_load, stage, student, located(stage.teacher or teacher))
    return train_student(stage, load, partial(objective, stage), data, out)
