"""What all stages do that teach a student by a teacher: load both, train with an objective, score, save."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llamba.data.batches import Ordered, Rows
from llamba.data.tokens import StageData
from llamba.models.loading import load_model, load_teacher
from llamba.models.mixers import drop_window
from llamba.settings import TokenTraining
from llamba.training.learnable import other_rates
from llamba.training.metrics import METRICS
from llamba.training.trainer import DistillTrainer, Objective, train_and_save, training_arguments

Pair = tuple[PreTrainedModel, PreTrainedModel]


def load_pair(stage: TokenTraining, student: str, teacher: str) -> Pair:
    """The student in fp32; the teacher as it was saved, or in fp32 where the stage computes in fp32."""
    student_model = load_model(student, torch.float32)
    return student_model, load_teacher(teacher, stage.precision)


def train_student(
    stage: TokenTraining,
    load: Callable[[], tuple[PreTrainedModel, PreTrainedModel | None]],
    objective: Objective,
    data: StageData,
    out: Path,
    *,
    rows: Callable[[str], Rows | None] | None = None,
    mean_of_means: bool = False,
) -> dict[str, float]:
    """Train the student that `load` gives against its teacher, leaving the result in `out`.

    `rows` stands in for `data.rows`; `mean_of_means`: each forward pass counts alike, whatever its number of targets.
    An interrupted run is resumed from its newest complete checkpoint, in `out/checkpoints`. Returns the last line of
    `out/metrics.jsonl`, the scores on held-out rows, and how many processes trained. Raises ValueError for a loss that is
    not finite, and a full disk.
    """
    read = rows or data.rows
    train = read("train")
    assert train is not None
    ordered = Ordered(train, stage.batch, data.seed, epochs=stage.epochs, steps=stage.steps, tokens=stage.tokens)
    folder = out / "checkpoints"
    args = training_arguments(stage, ordered.steps, data.seed, folder)  # before the models: under ZeRO-3 it decides how they load
    student_model, teacher_model = load()
    drop_window(student_model, stage.drop_window)
    args.use_cache = student_model.config.use_cache
    trainer = DistillTrainer(
        student_model, teacher_model, objective, args, ordered, out / METRICS, other_rates(student_model, stage), mean_of_means
    )
    held_out = read("eval")
    return train_and_save(trainer, out, lambda: trainer.held_out(held_out) if held_out else {})
