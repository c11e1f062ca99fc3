"""Distillation on logits: forward KL to the teacher plus cross-entropy (Mamba-in-Llama, equation 2; MOHAWK, stage 3)."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamba.batches import Batch
from llamba.data import Prepared
from llamba.folders import resolve_model
from llamba.losses import Sums, head_sums
from llamba.settings import Distill
from llamba.stages.teach import load_pair, teach
from llamba.train import freeze, model_inputs


def _hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states after the final norm, [B, T, D]."""
    hidden: Tensor = model.base_model(**model_inputs(batch), use_cache=False).last_hidden_state
    return hidden


def objective(stage: Distill, student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> Sums:
    """kl · Σ KL(teacher || student) + ce · Σ CE over the batch's target tokens."""
    with torch.no_grad():
        guide = _hidden(teacher, batch)
    heads = student.get_output_embeddings(), teacher.get_output_embeddings()
    return head_sums(_hidden(student, batch), guide, *heads, batch["labels"], kl=stage.kl, ce=stage.ce, temperature=stage.temperature)


def _load(stage: Distill, student: str, teacher: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    pupil, guide = load_pair(stage, student, teacher)
    own, other = pupil.config.vocab_size, guide.config.vocab_size
    if own != other:
        raise ValueError(f"student and teacher must share a vocabulary, got {own} tokens in {student} and {other} in {teacher}")
    freeze(pupil, stage.train)
    return pupil, guide


def run(stage: Distill, student: str, teacher: str, data: Prepared, out: Path) -> dict[str, float]:
    """Distil the model folder `teacher` into the model folder `student`, leaving the result in `out`; see `teach`.

    Raises ValueError for vocabularies that differ, too.
    """
    load = partial(_load, stage, student, resolve_model(stage.teacher or teacher))
    return teach(stage, load, partial(objective, stage), data, out)
