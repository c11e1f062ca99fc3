"""A recipe's run: a folder that fills stage by stage, and that the same command continues wherever it was stopped.

    output/recipe.json     the recipe, resolved
    output/data/           tokenised rows, a folder per set, whose data.json says where they came from and what became of them
    output/0-convert/      a model folder per step: weights, config, tokenizer, stage.json, DONE
    output/1-distill/      the same, with metrics.jsonl, and with checkpoints/ while it is being trained
    output/2-convert/      where stage 2 says `attention`: its student, converted further
    output/2-distill/

A step's folder counts from the moment it holds DONE, which is written last.
"""

import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from llamba.base.folders import DONE, finished
from llamba.base.foreign import read_object
from llamba.base.locks import LOCK, folder_lock
from llamba.base.provenance import versions
from llamba.data import pairs
from llamba.data import tokens as data
from llamba.data.batches import Rows
from llamba.data.tokens import StageData
from llamba.models.loading import load_tokenizer, located
from llamba.running.inputs import STAGE, limit_of, other_teacher, pairing, sources_of, starts_of
from llamba.settings import Attention, Data, Dpo, Draft, PseudoLabel, Recipe, Select, Sft, TokenTraining, layers_of, overrides
from llamba.settings.common import sources_at_hand
from llamba.training import checkpoints

RECIPE = "recipe.json"
SIDE_STAGES = (PseudoLabel, Draft)  # stages that make something beside the student
_MAY_CHANGE = {"gradient_checkpointing", "log_every", "micro_batch", "report_to", "save_every"}  # in a stage that has begun
_WAIT_SECONDS = 6 * 3600  # for the one process that converts and tokenises


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def _result_settings(stage: dict[str, Any]) -> dict[str, Any]:
    """The settings of a stage that its result depends on. (Published code counts each forward pass alike, whatever its size.)"""
    lasting = {"micro_batch"} if stage.get("reduction") == "batchmean_legacy" else set()
    return {key: value for key, value in stage.items() if key not in _MAY_CHANGE or key in lasting}


def _identity(recipe: Recipe, out: Path) -> dict[str, Any]:
    """What of a recipe the finished and begun work in `out` rests on."""
    values = overrides.to_dict(recipe)
    begun = [_result_settings(stage) for number, stage in enumerate(values["stages"], 1) if any(out.glob(f"{number}-*"))]
    first = {key: values[key] for key in ("seed", "student", "teacher")} if finished(out) else {}
    return first | {"stages": [stage | {"data": stage["data"] or values["data"]} for stage in begun]}


def _claim(recipe: Recipe, out: Path) -> None:
    """Make the folder this recipe's own. Raises ValueError if begun work in it belongs to another recipe."""
    path = out / RECIPE
    if path.exists():
        present = overrides.from_dict(read_object(path), str(path))
        if changed := overrides.differences(_identity(present, out), _identity(recipe, out)):
            raise ValueError(
                f"{out} holds a run of another recipe ({'; '.join(changed)}); "
                "give the old values, choose another output, or delete the folder"
            )
    elif out.exists() and any(entry.name not in (f"{RECIPE}.partial", LOCK) for entry in out.iterdir()):
        raise ValueError(f"output must be a new folder or a run folder, got {out}, which has files but no {RECIPE}")
    out.mkdir(parents=True, exist_ok=True)
    _write(path, overrides.to_dict(recipe))


def _describe(folder: Path, name: str, settings: dict[str, Any], started: float, results: dict[str, Any], **more: Any) -> None:
    """Write stage.json and, last, DONE."""
    report = {
        "stage": name,
        "config": settings,
        "results": results,
        "command": sys.argv,
        "seconds": round(time.time() - started, 1),
        "versions": versions(),
        **more,
    }
    _write(folder / STAGE, report)
    (folder / DONE).touch()


def _convert(recipe: Recipe, attention: Attention, source: str, folder: Path) -> None:
    """Convert the model `source` into `folder`, which appears whole or not at all."""
    from llamba.models.convert import convert

    started, partial = time.time(), folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    choice = recipe.student
    rows = None
    if choice.calibrate and folder.name.startswith("0-"):
        found = sources_at_hand(recipe.data)
        assert found is not None, "the recipe was checked"
        rows = calibration_rows(found, source, choice.calibrate)
    student = convert(
        source, mixer=choice.mixer, attention=layers_of(attention), init=choice.init, seed=recipe.seed, options=choice.options,
        calibrate=rows,
    )  # fmt: skip
    student.save_pretrained(partial)
    load_tokenizer(source).save_pretrained(partial)
    conversion: Any = student.conversion
    _write(partial / "conversion.json", conversion.to_json())
    _describe(partial, "convert", overrides.to_dict(recipe)["student"] | {"attention": attention}, started, {})
    os.replace(partial, folder)
    del student
    gc.collect()


def calibration_rows(found: Data, source: str, tokens: int) -> list[Any]:
    """Rows of token ids, so many in all, as the model `source` counts them.

    Raises ValueError for broken rows and where there are none.
    """
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "rows"
        data.tokenize(found, load_tokenizer(source), "all", made, tokens)
        rows = Rows(made / "train")
        print(f"fitting joins to attention on {tokens:,} tokens", flush=True)
        return [rows[index]["input_ids"] for index in range(len(rows))]


def _prepare(recipe: Recipe, number: int, source: str, out: Path) -> StageData:
    """The data of stage `number`: tokenised by the first process, unless that was done, in which case it is checked."""
    stage = recipe.stages[number - 1]
    config = sources_of(stage.data or recipe.data, out, number)
    if not isinstance(stage, (TokenTraining, Select, Sft, Dpo)):
        return StageData(config, recipe.seed)
    limit, starts, other = limit_of(config, stage), starts_of(config, out, number), other_teacher(recipe, stage, source)
    folder = out / "data" / data.set_name(config, stage.targets, limit, starts, other)

    def work() -> None:
        if folder.exists():
            data.check_unchanged(read_object(folder / data.MANIFEST))
        elif stage.targets == "pairs":
            pairs.tokenize_pairs(config, load_tokenizer(source), stage.targets, folder)
        else:
            pair = other and pairing(config, source, other)
            data.tokenize(config, load_tokenizer(source), stage.targets, folder, limit, starts, pair or None)

    _on_first_process(folder, work)
    return StageData(config, recipe.seed, folder)


def _on_first_process(marker: Path, work: Callable[[], None]) -> None:
    """Do `work`, which leaves `marker`, in the first process; in the others wait for it."""
    deadline = time.monotonic() + _WAIT_SECONDS
    if _rank() == 0:
        work()
    while not marker.exists():
        if time.monotonic() > deadline:
            raise ValueError(f"waited {_WAIT_SECONDS // 3600} hours for the first process to finish {marker.parent}, and it did not")
        time.sleep(0.5)


def _stage(recipe: Recipe, number: int, previous: Path, out: Path) -> Path:
    """Do stage `number` (from 1), unless it is done, and return the folder of the student after it."""
    from llamba.stages import STAGES  # here, so that chat and plan need not import the trainer

    stage = recipe.stages[number - 1]
    if stage.attention is not None:
        attention, source, previous = stage.attention, previous, out / f"{number}-convert"
        _on_first_process(
            previous / DONE, lambda: None if (previous / DONE).exists() else _convert(recipe, attention, str(source), previous)
        )
    folder = out / f"{number}-{stage.name}"
    if not (folder / DONE).exists():
        prepared = _prepare(recipe, number, str(previous), out)
        started, settings = time.time(), overrides.to_dict(recipe)["stages"][number - 1]
        results = STAGES[stage.name](stage, str(previous), located(recipe.teacher), prepared, folder)

        def finish() -> None:
            if (folder / "config.json").exists():
                load_tokenizer(previous).save_pretrained(folder)
            stopped = {} if prepared.folder is None else data.stopped(prepared.config, prepared.folder)
            _describe(folder, stage.name, settings, started, results, **({"stopped_at": stopped} if stopped else {}))

        _on_first_process(folder / DONE, finish)
    if _rank() == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return previous if isinstance(stage, SIDE_STAGES) else folder


def run(recipe: Recipe) -> Path:
    """Do what is left of a recipe, and return the student's last folder.

    Under a launcher every process calls this; conversion and tokenising are done by the first process alone. Raises
    ValueError for anything wrong with the recipe, its teacher, its data, its folder or the disk.
    """
    from llamba.running import preflight

    out, teacher = Path(recipe.output), located(recipe.teacher)
    with checkpoints.disk_errors(out), folder_lock(out) if _rank() == 0 else nullcontext():
        if _rank() == 0:
            _claim(recipe, out)
            preflight.check(recipe, out)
        last = out / "0-convert"
        first = last
        _on_first_process(
            first / DONE, lambda: None if (first / DONE).exists() else _convert(recipe, recipe.student.attention, teacher, first)
        )
        for number in [number for number, stage in enumerate(recipe.stages, 1) if not stage.skip]:
            last = _stage(recipe, number, last, out)
    return last
