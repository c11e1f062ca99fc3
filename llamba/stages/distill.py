"""Distillation on logits: a divergence from the teacher plus cross-entropy (Mamba-in-Llama, equation 2; MOHAWK, stage 3).

A teacher that counts other tokens is compared by spans of text.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamba.base.devices import on_cpu, own_device, processes
from llamba.data.batches import KEPT, SPANS, Batch, Rows
from llamba.data.tokens import StageData
from llamba.models.activations import input_of_layer
from llamba.models.documents import by_document
from llamba.models.loading import load_model, load_teacher, located, require_same_vocabulary, vocabularies_differ
from llamba.settings import Distill
from llamba.stages.shared import train_student
from llamba.training import stored_logits as offline
from llamba.training.frozen import shared_layers
from llamba.training.learnable import freeze
from llamba.training.losses import Aligned, Sums, TopK, head_sums, span_sums
from llamba.training.trainer import model_inputs


def _hidden(model: PreTrainedModel, batch: Batch, padded: bool, **more: Any) -> Tensor:
    """Last hidden states after the final norm, [B, T, D]. `padded`: what padding sees counts, too, and is what transformers makes it."""
    documents = {} if padded else by_document(model, batch)
    hidden: Tensor = model.base_model(**model_inputs(batch), **documents, **more, use_cache=False).last_hidden_state
    return hidden


def _hidden_of_both(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, padded: bool) -> tuple[Tensor, Tensor]:
    """The same of student and teacher [B, T, D and D']; the first layers run once where they are one computation."""
    shared = shared_layers(student, teacher)
    with torch.no_grad():
        teacher_hidden, stream = input_of_layer(teacher, shared, partial(_hidden, teacher, batch, padded))
    return _hidden(student, batch, padded, **({"first": shared, "stream": stream} if shared else {})), teacher_hidden


def objective(stage: Distill, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch) -> Sums:
    """kl · Σ divergence + ce · Σ CE over the batch's target tokens; without a teacher, from its kept logits in the batch."""
    teacher_hidden: Tensor | TopK
    padded = stage.reduction == "batchmean_legacy"  # sums over all positions
    if teacher is None:
        hidden, teacher_hidden, head = _hidden(student, batch, padded), TopK(*(batch[key] for key in KEPT)), None
    else:
        (hidden, teacher_hidden), head = _hidden_of_both(student, teacher, batch, padded), teacher.get_output_embeddings()
    settings = {key: getattr(stage, key) for key in ("kl", "ce", "temperature", "divergence", "beta", "reduction")}
    return head_sums(hidden, teacher_hidden, student.get_output_embeddings(), head, batch["labels"], **settings)


def objective_of_spans(stage: Distill, student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> Sums:
    """kl · Σ divergence over spans + ce · Σ CE over target tokens, where the teacher reads the same words in other tokens."""
    theirs = {"input_ids": batch["teacher_ids"], "position_ids": batch["teacher_positions"]}
    with torch.no_grad():
        heard = Aligned(_hidden(teacher, theirs, False), batch["teacher_ids"], batch["teacher_spans"])
    own = Aligned(_hidden(student, batch, False), batch["input_ids"], batch[SPANS])
    settings = {key: getattr(stage, key) for key in ("kl", "ce", "divergence", "beta")}
    heads = student.get_output_embeddings(), teacher.get_output_embeddings()
    return span_sums(own, heard, *heads, batch["labels"], temperature=stage.span_temperature, **settings)


def _load(stage: Distill, student: str, teacher: str) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The student in fp32, and the teacher where it takes part in training: as it was saved, in fp32, or quantised."""
    if stage.match == "tokens":
        require_same_vocabulary(student, teacher)
    student_model = load_model(student, torch.float32)
    freeze(student_model, stage.train)
    if stage.offline:
        return student_model, None
    return student_model, load_teacher(teacher, stage.precision, stage.teacher_bits, own_device() if stage.teacher_bits else None)


def _rows(stage: Distill, student: str, teacher: str, data: StageData, out: Path, split: str) -> Rows | None:
    """A split's rows, with the teacher's kept logits where the stage wants them; the teacher runs here, before all else."""
    rows = data.rows(split)
    if rows is None or not stage.offline:
        return rows
    require_same_vocabulary(student, teacher)
    several = processes() == 1 and not on_cpu() and torch.accelerator.device_count() > 1
    load = partial(load_teacher, teacher, stage.precision, stage.teacher_bits, "auto" if several else own_device())
    assert data.folder is not None
    folder = Path(stage.offline_folder) if stage.offline_folder else out.parent / "logits"
    return offline.store_logits(stage, data.folder / split, teacher, load, folder)


def run(stage: Distill, student: str, teacher: str, data: StageData, out: Path) -> dict[str, float]:
    """Distil the model folder `teacher` into the model folder `student`, leaving the result in `out`; see `train_student`.

    Raises ValueError for vocabularies that differ, too, and for a teacher that cannot be loaded as the stage says.
    """
    teacher = located(stage.teacher or teacher)
    rows = {split: _rows(stage, student, teacher, data, out, split) for split in ("train", "eval")}
    load, legacy = partial(_load, stage, student, teacher), stage.reduction == "batchmean_legacy"
    spans = stage.match == "spans" and vocabularies_differ(student, teacher)
    compared = partial(objective_of_spans if spans else objective, stage)
    return train_student(stage, load, compared, data, out, rows=rows.get, mean_of_means=legacy)
