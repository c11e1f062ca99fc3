"""Distillation on logits: forward KL to the teacher plus cross-entropy (Mamba-in-Llama, equation 2; MOHAWK, stage 3)."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llamba.batches import Batch, Ordered
from llamba.data import Prepared
from llamba.folders import resolve_model
from llamba.log import METRICS
from llamba.losses import Sums, head_sums
from llamba.settings import Distill
from llamba.train import DistillTrainer, carry_out, freeze, model_inputs, training_arguments


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
    """The student in fp32; the teacher as it was saved, or in fp32 where the stage computes in fp32."""
    pupil = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    guide = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto" if stage.precision == "bf16" else torch.float32)
    own, other = pupil.config.vocab_size, guide.config.vocab_size
    if own != other:
        raise ValueError(f"student and teacher must share a vocabulary, got {own} tokens in {student} and {other} in {teacher}")
    freeze(pupil, stage.train)
    return pupil, guide


def run(stage: Distill, student: str, teacher: str, data: Prepared, out: Path) -> dict[str, float]:
    """Distil the model folder `teacher` into the model folder `student`, leaving the result in `out`.

    An interrupted run is resumed from its newest complete checkpoint, in `out/checkpoints`. Returns the last line of
    `out/metrics.jsonl`, the scores on held-out rows, and how many processes trained. Raises ValueError for a loss that is
    not finite, a full disk, or vocabularies that differ.
    """
    rows = data.rows("train")
    assert rows is not None
    ordered = Ordered(rows, stage.batch, data.seed, epochs=stage.epochs, steps=stage.steps, tokens=stage.tokens)
    folder = out / "checkpoints"
    args = training_arguments(stage, ordered.steps, data.seed, folder)  # before the models: under ZeRO-3 it decides how they load
    pupil, guide = _load(stage, student, resolve_model(stage.teacher or teacher))
    args.use_cache = pupil.config.use_cache
    trainer = DistillTrainer(pupil, guide, partial(objective, stage), args, ordered, out / METRICS, stage.rest_lr)
    held_out = data.rows("eval")
    return carry_out(trainer, out, lambda: trainer.held_out(held_out) if held_out else {})
