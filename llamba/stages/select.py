"""Selection as a stage and as a command: score the layers, write the list, and give the student the best layers' attention back."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from llamba.base.devices import own_device
from llamba.data.batches import Batch, Ordered, Rows, collate
from llamba.data.tokens import StageData, tokenize
from llamba.models.convert import convert, kept_layers
from llamba.models.documents import attend_by_document
from llamba.models.loading import load_model, load_tokenizer, located
from llamba.settings import Data, Select
from llamba.training.frozen import lower_whole
from llamba.training.layer_ranking import Ranking, divergence, rank, restore, save, table

LAYERS = "layers.json"


def _pair(teacher: str, student: str | None, mixer: str, seed: int, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """The teacher as a hybrid with attention everywhere, and the student (fresh from conversion where none is named).

    In the teacher's own dtype on an accelerator; on a CPU in fp32, which `_computing` computes with in bf16.
    """
    if student is None:
        student_model = convert(teacher, mixer=mixer, attention=0, seed=seed, options=options)
    else:
        student_model = load_model(student)
    teacher_model = convert(teacher, mixer=_mixer(student_model, student), attention=1.0)
    device = own_device()
    if device.type != "cpu":
        return teacher_model.to(device), student_model.to(device, teacher_model.dtype)
    for model in (teacher_model.float(), student_model.float()):
        lower_whole(model)
        attend_by_document(model)
    return teacher_model, student_model


def _computing() -> AbstractContextManager[object]:
    """Products in bf16 on a CPU."""
    return torch.autocast("cpu", torch.bfloat16) if own_device().type == "cpu" else nullcontext()


def _mixer(student: Any, name: str | None) -> str:
    stored = student.config.to_dict().get("mixer")
    if not stored:
        raise ValueError(f"selection needs a student with every layer converted (student.attention=0); {name} is no hybrid")
    kind: str = stored["kind"]
    return kind


def _choose(
    stage: Select, teacher_model: Any, student_model: Any, batches: Sequence[Batch], path: Path, facts: dict[str, Any]
) -> tuple[Ranking, list[int]]:
    """Rank, choose, write `path` and its picture, print the table and the KL that is left with the chosen and with uniform layers."""
    with _computing():
        ranking = rank(teacher_model, student_model, batches, stage.method, stage.heads, stage.per_row)
        layers = ranking.kept(stage.keep)
        choices = {"none": [], "selected": layers, "uniform": kept_layers(stage.keep, len(ranking.scores))}
        kl = {name: divergence(teacher_model, student_model, batches, chosen, stage.per_row) for name, chosen in choices.items()}
    save(ranking, layers, path, {**facts, "keep": stage.keep, "kl_with_attention_in": kl})
    print(table(ranking, layers))
    print(f"KL with attention in no layer {kl['none']:.4g}, in these {kl['selected']:.4g}, in every n-th {kl['uniform']:.4g}", flush=True)
    return ranking, layers


def _batches(stage: Select, rows: Rows, seed: int) -> list[Batch]:
    steps = max(1, min(stage.rows, len(rows)) // stage.micro_batch)
    ordered = Ordered(rows, stage.micro_batch, seed, epochs=1, steps=steps, tokens=None)
    size, device = stage.micro_batch, own_device()
    made = [collate([ordered[index] for index in range(start, start + size)], 0) for start in range(0, len(ordered), size)]
    return [{key: value.to(device) for key, value in batch.items()} for batch in made]


def run(stage: Select, student: str, teacher: str, data: StageData, out: Path) -> dict[str, float]:
    """Score the layers of the model folder `student`, restore the best of them from `teacher`, and leave the result in `out`.

    The first process works; the others have nothing to do. Returns the KL before and after. Raises ValueError where the student
    has attention already, or is not made of this teacher.
    """
    if int(os.environ.get("RANK", "0")):
        return {}
    rows = data.rows("train")
    assert rows is not None
    teacher_model, student_model = _pair(teacher, student, "", data.seed)
    ranking, layers = _choose(
        stage, teacher_model, student_model, _batches(stage, rows, data.seed), out / LAYERS, {"teacher": teacher, "student": student}
    )
    kind = _mixer(student_model, student)
    del teacher_model, student_model  # may be in 16 bit: what is saved is read again
    result = load_model(student, torch.float32)
    restore(result, convert(teacher, mixer=kind, attention=1.0).float(), layers)
    result.save_pretrained(out)
    return {"start_kl": ranking.start, "target_tokens": ranking.targets}


def select(
    teacher: str,
    student: str | None,
    data: Data,
    stage: Select,
    path: Path,
    mixer: str = "auto",
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> list[int]:
    """`llamba select`: score the layers of `student`, or of a fresh conversion of `teacher`, and write `path` and its picture.

    Returns the layers that keep attention. Raises ValueError for names, data or models that do not serve.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"the layers are to be written to {path}, which is a folder or lies in one that cannot be written")
    guide_name = located(teacher)
    pupil_name = None if student is None else located(student)
    tokenizer = load_tokenizer(guide_name)
    with tempfile.TemporaryDirectory() as folder:
        tokenize(data, tokenizer, stage.targets, Path(folder) / "rows", stage.rows * data.length)
        batches = _batches(stage, Rows(Path(folder) / "rows" / "train"), seed)
    teacher_model, student_model = _pair(guide_name, pupil_name, mixer, seed, options)
    _, layers = _choose(
        stage,
        teacher_model,
        student_model,
        batches,
        path,
        {"teacher": teacher, "student": student or f"{teacher}, converted to {student_model.config.mixer['kind']}", "data": data.train},
    )
    print(f"saved: {path} (student.attention={path}), {path.with_suffix('.png')}")
    return layers
