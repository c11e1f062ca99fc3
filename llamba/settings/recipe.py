"""What a run is: one frozen value, declared in a Python file, checked when it is made.

    recipe = Recipe(teacher="org/model", student=Student(attention=0.5), data=Data(train="org/set:train"),
                    stages=[Distill()], output="runs/x")

Every value is checked against its annotation and its range, so a recipe that exists is a recipe that can start.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamba.base.foreign import reading
from llamba.settings.common import Attention, Data, Option, Stage, check_attention, check_types, require, sources_at_hand
from llamba.settings.stages import STAGE_CONFIGS
from llamba.settings.typed import fits, name_of


def layers_of(attention: Attention) -> float | list[int]:
    """The fraction, or the list of layers, which may stand in a JSON file, alone or as the `layers` of what `llamba select` wrote.

    Raises ValueError for a file that holds no such list.
    """
    if not isinstance(attention, str):
        return attention
    path = Path(attention)
    if not path.is_file():
        raise ValueError(f"attention must be a fraction, a list of layers or a JSON file with such a list, got {attention!r}")
    with reading(f"{path} must hold a JSON list of layer indices"):
        found = json.loads(path.read_bytes())
    layers = found.get("layers") if isinstance(found, dict) else found
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"{path} must hold a JSON list of layer indices, got {str(found)[:80]}")
    return layers


@dataclass(frozen=True)
class Student:
    """What the teacher becomes.

    `attention` is the part of layers that keep attention (0 to 1), or the list of those layers, or the path of a JSON
    file that holds such a list, as `llamba select` writes it.
    `mixer` names what stands in the other layers ("auto": the best that we know), `init` where its weights come from, and `options`
    single values of the mixer, e.g. `{"window": 64, "sinks": 4, "rotary": True}`. `calibrate`: tokens of the data's sources (those that
    no stage makes) on which what stands for all that a window does not see is fitted to attention at the first conversion, and without a
    window out_proj; 0: the former starts with a low score, the latter as the teacher's.
    """

    mixer: str = "auto"
    attention: float | list[int] | str = 0.5
    init: str = "attention"
    options: dict[str, Option] = field(default_factory=dict)
    calibrate: int = 0

    def __post_init__(self) -> None:
        check_types(self, "student")
        require(self.calibrate >= 0, "student.calibrate", "a number of tokens >= 0", self.calibrate)
        check_attention(self.attention, "student.attention")


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
            require(fits(value, kind), f"recipe.{key}", name_of(kind), value)
        for stage in self.stages:
            require(type(stage) in STAGE_CONFIGS.values(), "recipe.stages", f"a list of {sorted(STAGE_CONFIGS)}", stage)
        if self.student.calibrate and not sources_at_hand(self.data):
            raise ValueError("student.calibrate needs a source in data.train that no stage makes; got none, leave it out")
        require(bool(self.teacher), "recipe.teacher", "a model folder or a hub name", self.teacher)
        require(bool(self.output), "recipe.output", "a folder", self.output)
        require(0 <= self.seed < 2**32, "recipe.seed", "a number from 0 to below 2**32", self.seed)
