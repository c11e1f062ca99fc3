"""The arms of `recipes/study.py` as values: what the teacher becomes, where it starts, and what trains it; and the recipe of each.

Arms start alike where they can: every layer is converted once and its joins are fitted (`Student(calibrate=...)`), and the teacher's
attention is given back where an arm keeps it. Those that start from the teacher itself are not fitted.
"""

import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llamba import Data, Distill, Dpo, Hidden, Recipe, Select, Sft, Student, convert, run
from llamba.base.folders import DONE
from llamba.models.convert import kept_layers
from llamba.models.loading import load_config, load_model, load_tokenizer, located
from llamba.settings import Stage
from llamba.training.layer_ranking import restore

TEACHER, FITTED, SELECTED = "teacher", "fitted", "selected"  # starts that are no arms
RATE, REST_RATE = 1e-4, 1e-5  # of what is trained; of all but the mixers where that has a rate of its own
SFT_RATE, DPO_RATE = 3e-5, 5e-6
KEPT = 64  # tokens a target, of which the teacher's logits are kept, once for all arms of a seed
PAIRS = 2  # of a step of DPO
PARTS = 8  # a seed reads every so manyth training row


@dataclass(frozen=True)
class Budget:
    """What an arm may read: `tokens` in all its stages before SFT, which reads half as many, and DPO, which reads `pairs`.

    `batch` sequences of `length` tokens make a step; joins are fitted on `calibrate` tokens.
    """

    tokens: int = 2_048
    calibrate: int = 4_096
    pairs: int = 8
    batch: int = 1
    length: int = 256


def _common(budget: Budget) -> dict[str, Any]:
    return dict(clip=1.0, warmup=0.1, floor=0.05, batch=budget.batch, micro_batch=budget.batch, save_every=10**6, log_every=4)


def _distill(budget: Budget, tokens: int, **more: Any) -> Distill:
    values: dict[str, Any] = {"kl": 1.0, "ce": 0.0, "targets": "all", "lr": RATE, "betas": (0.9, 0.95), "tokens": tokens, "offline": KEPT}
    return Distill(**values | _common(budget) | more)


def _one(budget: Budget) -> list[Stage]:
    return [_distill(budget, budget.tokens)]


def _hidden_first(budget: Budget) -> list[Stage]:
    half = budget.tokens // 2
    return [Hidden(lr=RATE, tokens=half, **_common(budget)), _distill(budget, half)]


def _by_steps(budget: Budget) -> list[Stage]:
    half = budget.tokens // 2
    return [_distill(budget, half), _distill(budget, half, attention=0.25)]


def _all(budget: Budget) -> list[Stage]:
    return [_distill(budget, budget.tokens, train="all")]


def _two_rates(budget: Budget) -> list[Stage]:
    return [_distill(budget, budget.tokens, train="all", rest_lr=REST_RATE)]


def _sft(budget: Budget) -> list[Stage]:
    return [Sft(lr=SFT_RATE, tokens=budget.tokens // 2, **_common(budget))]


def _dpo(budget: Budget) -> list[Stage]:
    return [Dpo(**{**_common(budget), "lr": DPO_RATE, "batch": PAIRS, "micro_batch": PAIRS, "steps": max(1, budget.pairs // PAIRS)})]


@dataclass(frozen=True)
class Arm:
    """`attention` is the part of layers that keep it; `start` one of TEACHER, FITTED, SELECTED or another arm; `stages` of a budget.

    `student` are values of the recipe's student, where the arm starts from the teacher. `window`: it is scored with the recurrence off,
    too.
    """

    attention: float
    stages: Callable[[Budget], list[Stage]] = _one
    start: str = FITTED
    student: dict[str, Any] = field(default_factory=dict)
    window: bool = False


ARMS = {
    "50%": Arm(0.5, window=True),
    "25%": Arm(0.25),
    "12.5%": Arm(0.125),
    "0%": Arm(0.0, window=True),
    "25%, selected layers": Arm(0.25, start=SELECTED),
    "50%, not fitted": Arm(0.5, start=TEACHER),
    "50%, random weights": Arm(0.5, start=TEACHER, student={"init": "random"}),
    "0%, not fitted": Arm(0.0, start=TEACHER),
    "0%, not fitted, hidden first": Arm(0.0, _hidden_first, start=TEACHER),
    "25%, not fitted": Arm(0.25, start=TEACHER),
    "25%, not fitted, by steps": Arm(0.5, _by_steps, start=TEACHER),
    "50%, all trained": Arm(0.5, _all),
    "50%, all trained, two rates": Arm(0.5, _two_rates),
    "50%, no mixers, all trained": Arm(0.5, _all, start=TEACHER, student={"mixer": "none"}),
    "50% + SFT": Arm(0.5, _sft, start="50%"),
    "50% + DPO": Arm(0.5, _dpo, start="50%"),
    "50% + SFT + DPO": Arm(0.5, _dpo, start="50% + SFT"),
}


def slug(name: str) -> str:
    """An arm's name as a file's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Study:
    """What all arms share: the teacher, the mixer, rows of chats and of DPO, the budget, and the folder of runs."""

    teacher: str
    budget: Budget
    chats: str
    pairs: str
    folder: Path
    mixer: str = "auto"

    def _data(self, seed: int) -> Data:
        part = (seed % PARTS, PARTS)
        return Data(train=self.chats, length=self.budget.length, packing=True, streaming=True, part=part)

    def run_folder(self, name: str, seed: int) -> Path:
        """Where an arm's run lies."""
        return self.folder / f"{slug(name)}-{seed}"

    def recipe(self, name: str, seed: int) -> Recipe:
        """An arm's recipe; what it starts from is made where it is not there."""
        arm = ARMS[name]
        stages = [self._placed(stage, seed) for stage in arm.stages(self.budget)]
        if arm.start == TEACHER:
            own: dict[str, Any] = {"mixer": self.mixer, "attention": arm.attention}
            student, teacher = Student(**own | arm.student), self.teacher
        else:
            student, teacher = Student(mixer="auto", attention=1.0), str(self.start(arm, seed))
        return Recipe(teacher, student, self._data(seed), stages, str(self.run_folder(name, seed)), seed)

    def _placed(self, stage: Stage, seed: int) -> Stage:
        """A stage with its data and, where it has one, the study's teacher: the recipe's may be the arm's start."""
        data = Data(train=self.pairs, length=self.budget.length) if isinstance(stage, Dpo) else self._data(seed)
        more = {"teacher": self.teacher, "offline_folder": str(self.folder / "logits")}
        return type(stage)(**vars(stage) | {"data": data} | {key: value for key, value in more.items() if key in vars(stage)})

    def fitted(self) -> Recipe:
        """Every layer converted and fitted, on the first seed's rows; then, to choose from, attention back in a quarter of them."""
        student = Student(mixer=self.mixer, attention=0, calibrate=self.budget.calibrate)
        select = Select(keep=0.25, method="swap", rows=4, micro_batch=2, targets="all")
        return Recipe(self.teacher, student, self._data(0), [select], str(self.folder / FITTED), 0)

    def start(self, arm: Arm, seed: int) -> Path:
        """The model folder that an arm starts from, made where it is not there."""
        if arm.start in ARMS:
            return self.trained(arm.start, seed)
        selected = _run(self.fitted())
        if arm.start == SELECTED:
            return selected
        converted = selected.with_name("0-convert")
        layers = kept_layers(arm.attention, load_config(located(self.teacher)).num_hidden_layers)
        return restored(converted, self.teacher, layers, self.folder / f"start-{arm.attention:g}") if layers else converted

    def trained(self, name: str, seed: int) -> Path:
        """An arm's last model folder, trained where it is not there. Raises ValueError as `run`."""
        return _run(self.recipe(name, seed))

    def finish(self, seed: int, left: Collection[str]) -> None:
        """Delete the weights of a seed's arms that no arm of those `left` starts from."""
        needed = {start for name in left for start in starts(name)}
        for name in ARMS:
            if name not in needed:
                for path in self.run_folder(name, seed).glob("**/*.safetensors"):
                    path.unlink()


def starts(name: str) -> list[str]:
    """What an arm starts from, and that from, and so on."""
    start = ARMS[name].start
    return [start, *(starts(start) if start in ARMS else [])]


def trained_tokens(name: str, budget: Budget) -> int:
    """Tokens that an arm and what it starts from are trained on; DPO's pairs are not counted."""
    if name not in ARMS:
        return 0
    return trained_tokens(ARMS[name].start, budget) + sum(getattr(stage, "tokens", None) or 0 for stage in ARMS[name].stages(budget))


def _run(recipe: Recipe) -> Path:
    """A run's last model folder; a run that is done, and whose weights were deleted, is done again."""
    folder = Path(recipe.output)
    if list(folder.glob(f"*/{DONE}")) and not list(folder.glob("*/*.safetensors")):
        shutil.rmtree(folder)
    return run(recipe)


def restored(converted: Path, teacher: str, layers: Sequence[int], folder: Path) -> Path:
    """A model folder: the fitted student with the teacher's attention back in `layers`."""
    if not folder.exists():
        student: Any = load_model(str(converted), torch.float32)
        restore(student, convert(located(teacher), mixer=student.config.mixer["kind"], attention=1.0).float(), layers)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        student.save_pretrained(partial)
        load_tokenizer(str(converted)).save_pretrained(partial)
        os.replace(partial, folder)
    return folder
