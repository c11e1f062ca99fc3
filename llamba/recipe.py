"""What a run is: one frozen value, declared in a Python file, checked when it is made.

    recipe = Recipe(teacher="org/model", student=Student(attention=0.5), data=Data(train="org/set:train"),
                    stages=[Distill()], output="runs/x")

Every value is checked against its annotation and its range, so a recipe that exists is a recipe that can start.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

from llamba.typed import fits, name_of


def _require(condition: bool, key: str, needed: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{key} must be {needed}, got {got!r}")


def _check_types(value: Any, prefix: str) -> None:
    hints = get_type_hints(type(value))
    for field in fields(value):
        got = getattr(value, field.name)
        _require(fits(got, hints[field.name]), f"{prefix}.{field.name}", name_of(hints[field.name]), got)


@dataclass(frozen=True)
class Student:
    """What the teacher becomes.

    `attention` is the part of layers that keep attention (0 to 1), or the list of those layers, or the path of a JSON
    file that holds such a list. `mixer` names what stands in the other layers, `init` where its weights come from.
    """

    mixer: str = "mamba2"
    attention: float | list[int] | str = 0.5
    init: str = "attention"

    def __post_init__(self) -> None:
        _check_types(self, "student")
        if isinstance(self.attention, list):
            needed = "a list of different layer indices >= 0"
            _require(all(layer >= 0 for layer in self.attention), "student.attention", needed, self.attention)
            _require(len(set(self.attention)) == len(self.attention), "student.attention", needed, self.attention)
        elif not isinstance(self.attention, str):
            _require(0 <= self.attention <= 1, "student.attention", "a fraction from 0 to 1 or a list of layers", self.attention)

    def layers(self) -> float | list[int]:
        """The fraction, or the list of layers, which may stand in a JSON file. Raises ValueError for a file that does not hold one."""
        if not isinstance(self.attention, str):
            return self.attention
        path = Path(self.attention)
        if not path.is_file():
            raise ValueError(
                f"student.attention must be a fraction, a list of layers or a JSON file with such a list, got {self.attention!r}"
            )
        layers = json.loads(path.read_text())
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise ValueError(f"{path} must hold a JSON list of layer indices, got {str(layers)[:80]}")
        return layers


@dataclass(frozen=True)
class Data:
    """Rows to learn from: `.jsonl`, `.jsonl.gz` or `.parquet` files, folders of those, or hub sets `org/name:split`.

    A row is `{"messages": [...]}` or `{"text": "..."}`; rows are cut at `length` tokens. `template` replaces the
    tokenizer's chat template while tokenising: a file, or the name of one that the library brings (`llama3`). It is
    needed where the model's own template does not mark the assistant's words with `{% generation %}`.
    """

    train: str | list[str]
    eval: str | list[str] | None = None
    length: int = 2048
    template: str | None = None

    def __post_init__(self) -> None:
        _check_types(self, "data")
        _require(bool(self.train), "data.train", "at least one source", self.train)
        _require(self.length >= 2, "data.length", "at least 2 tokens", self.length)


@dataclass(frozen=True)
class Distill:
    """Distillation on logits: `kl` times KL(teacher || student) plus `ce` times cross-entropy, means over target tokens.

    `batch` counts sequences per optimizer step over all processes, `micro_batch` those in one forward pass of one
    process. The length of the stage is `steps` (optimizer steps) or `tokens`, else `epochs`. `warmup`, `save_every` and
    `log_every` count optimizer steps. `train` says what is trained: `mixers` freezes all else. `targets` says which
    tokens count: the assistant's, or all.
    """

    name: ClassVar[str] = "distill"

    kl: float = 0.1
    ce: float = 1.0
    temperature: float = 1.0
    train: Literal["mixers", "all"] = "mixers"
    targets: Literal["assistant", "all"] = "assistant"
    lr: float = 8e-5
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip: float = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = 63
    batch: int = 64
    micro_batch: int = 1
    epochs: float = 1.0
    steps: int | None = None
    tokens: int | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    save_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas) if isinstance(self.betas, list) else self.betas)
        _check_types(self, self.name)
        for key in ("kl", "ce", "weight_decay", "clip", "warmup"):
            _require(0 <= getattr(self, key) < math.inf, f"{self.name}.{key}", "a number >= 0", getattr(self, key))
        for key in ("lr", "temperature", "epochs", "batch", "micro_batch", "save_every", "log_every", "steps", "tokens"):
            value = getattr(self, key)
            _require(value is None or 0 < value < math.inf, f"{self.name}.{key}", "a number > 0", value)
        _require(self.kl + self.ce > 0, f"{self.name}.kl + {self.name}.ce", "greater than 0", self.kl + self.ce)
        _require(all(0 <= beta < 1 for beta in self.betas), f"{self.name}.betas", "two numbers in [0, 1)", self.betas)
        if self.steps is not None and self.tokens is not None:
            raise ValueError(f"{self.name}: give steps or tokens, not both, got steps={self.steps} tokens={self.tokens}")


Stage = Distill
STAGE_CONFIGS: dict[str, type[Stage]] = {"distill": Distill}


@dataclass(frozen=True)
class Recipe:
    """A teacher, what it becomes, the data, the stages in order, and the folder that receives the run.

    `teacher` is a hub name, a model folder or a run folder. `seed` fixes new weights and the order of rows.
    """

    teacher: str
    student: Student
    data: Data
    stages: Sequence[Stage]
    output: str
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        for key, kind in (("teacher", str), ("student", Student), ("data", Data), ("output", str), ("seed", int)):
            value = getattr(self, key)
            _require(fits(value, kind), f"recipe.{key}", name_of(kind), value)
        for stage in self.stages:
            _require(type(stage) in STAGE_CONFIGS.values(), "recipe.stages", f"a list of {sorted(STAGE_CONFIGS)}", stage)
        _require(bool(self.teacher), "recipe.teacher", "a model folder or a hub name", self.teacher)
        _require(bool(self.output), "recipe.output", "a folder", self.output)
        _require(self.seed >= 0, "recipe.seed", "a number >= 0", self.seed)
