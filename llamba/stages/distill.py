"""Distillation on logits: a divergence from the teacher plus cross-entropy (Mamba-in-Llama, equation 2; MOHAWK, stage 3)."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llamba import checkpoints, offline
from llamba.batches import KEPT, Batch, Ordered, Rows
from llamba.data import Prepared
from llamba.folders import resolve_model
from llamba.loading import load_teacher, require_same_vocabulary
from llamba.log import METRICS, append_metrics, read_metrics
from llamba.losses import Sums, TopK, head_sums
from llamba.settings import Distill
from llamba.train import DistillTrainer, freeze, model_inputs, on_cpu, own_device, processes, training_arguments


def _hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states after the final norm, [B, T, D]."""
    hidden: Tensor = model.base_model(**model_inputs(batch), use_cache=False).last_hidden_state
    return hidden


def objective(stage: Distill, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch) -> Sums:
    """kl · Σ divergence + ce · Σ CE over the batch's target tokens; without a teacher, from its kept logits in the batch."""
    guide: Tensor | TopK
    if teacher is None:
        guide, head = TopK(*(batch[key] for key in KEPT)), None
    else:
        with torch.no_grad():
            guide, head = _hidden(teacher, batch), teacher.get_output_embeddings()
    settings = {key: getattr(stage, key) for key in ("kl", "ce", "temperature", "divergence", "beta", "reduction")}
    return head_sums(_hidden(student, batch), guide, student.get_output_embeddings(), head, batch["labels"], **settings)


def _load(stage: Distill, student: str, teacher: str) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The student in fp32, and the teacher where it takes part in training: as it was saved, in fp32, or quantised."""
    require_same_vocabulary(student, teacher)
    pupil = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    freeze(pupil, stage.train)
    if stage.offline:
        return pupil, None
    return pupil, load_teacher(teacher, stage.precision, stage.teacher_bits, own_device() if stage.teacher_bits else None)


def _rows(stage: Distill, student: str, teacher: str, data: Prepared, out: Path, split: str) -> Rows | None:
    """A split's rows, with the teacher's kept logits where the stage wants them; the teacher runs here, before all else."""
    rows = data.rows(split)
    if rows is None or not stage.offline:
        return rows
    require_same_vocabulary(student, teacher)
    several = processes() == 1 and not on_cpu() and torch.accelerator.device_count() > 1
    load = partial(load_teacher, teacher, stage.precision, stage.teacher_bits, "auto" if several else own_device())
    assert data.folder is not None
    folder = Path(stage.offline_folder) if stage.offline_folder else out.parent / "logits"
    return offline.prepare(stage, data.folder / split, teacher, load, folder)


def run(stage: Distill, student: str, teacher: str, data: Prepared, out: Path) -> dict[str, float]:
    """Distil the model folder `teacher` into the model folder `student`, leaving the result in `out`.

    An interrupted run is resumed from its newest complete checkpoint, in `out/checkpoints`. Returns the last line of
    `out/metrics.jsonl`, the scores on held-out rows, and how many processes trained. Raises ValueError for a loss that is
    not finite, a full disk, vocabularies that differ, or a teacher that cannot be loaded as the stage says.
    """
    teacher = resolve_model(stage.teacher or teacher)
    rows, held_out = (_rows(stage, student, teacher, data, out, split) for split in ("train", "eval"))
    assert rows is not None
    ordered = Ordered(rows, stage.batch, data.seed, epochs=stage.epochs, steps=stage.steps, tokens=stage.tokens)
    folder = out / "checkpoints"
    args = training_arguments(stage, ordered.steps, data.seed, folder)  # before the models: under ZeRO-3 it decides how they load
    pupil, guide = _load(stage, student, teacher)
    args.use_cache = pupil.config.use_cache
    legacy = stage.reduction == "batchmean_legacy"
    trainer = DistillTrainer(pupil, guide, partial(objective, stage), args, ordered, out / METRICS, stage.rest_lr, legacy)
    if args.should_save:
        checkpoints.remove_incomplete(folder)
    found = checkpoints.complete(folder)
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    last = (read_metrics(out / METRICS) or [{}])[-1]
    scores = trainer.held_out(held_out) if held_out else {}
    trainer.save_model(str(out))
    if args.should_save:
        (out / "training_args.bin").unlink()  # a pickle that nothing here reads
        if scores:
            append_metrics(out / METRICS, {"step": ordered.steps, **scores})
    trainer.accelerator.wait_for_everyone()
    return {**last, **scores, "processes": trainer.accelerator.num_processes}
