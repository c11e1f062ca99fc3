"""A recipe's run: a folder that fills stage by stage, and that the same command continues wherever it was stopped.

    output/recipe.json     the recipe, resolved
    output/data/           tokenised rows; output/data.json says where they came from and what became of them
    output/0-convert/      a model folder per step: weights, config, tokenizer, stage.json, DONE
    output/1-distill/      the same, with metrics.jsonl, and with checkpoints/ while it is being trained

A step's folder counts from the moment it holds DONE, which is written last.
"""

import gc
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from llamba import checkpoints, data, overrides
from llamba.data import Prepared
from llamba.errors import one_line_errors
from llamba.folders import DONE, finished, resolve_model
from llamba.recipe import Recipe

RECIPE = "recipe.json"
STAGE = "stage.json"
_PACKAGES = ("llamba", "torch", "transformers", "accelerate", "safetensors", "tokenizers")
_WAIT_SECONDS = 6 * 3600  # for the one process that converts and tokenises


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def _claim(recipe: Recipe, out: Path) -> None:
    """Make the folder this recipe's own. Raises ValueError if finished work in it belongs to another recipe."""
    wanted = overrides.to_dict(recipe)
    path = out / RECIPE
    if path.exists():
        present = json.loads(path.read_text())
        settled = {"teacher", "student", "seed"} if finished(out) else set()
        settled |= set(wanted) - {"output"} if (out / "data" / DONE).exists() else set()
        old, new = ({key: values.get(key) for key in sorted(settled)} for values in (present, wanted))
        if changed := overrides.differences(old, new):
            raise ValueError(
                f"{out} holds a run of another recipe ({'; '.join(changed)}); "
                "give the old values, choose another output, or delete the folder"
            )
    elif out.exists() and any(entry.name != f"{RECIPE}.partial" for entry in out.iterdir()):
        raise ValueError(f"output must be a new folder or a run folder, got {out}, which has files but no {RECIPE}")
    out.mkdir(parents=True, exist_ok=True)
    _write(path, wanted)


def _describe(folder: Path, name: str, settings: dict[str, Any], started: float, results: dict[str, Any]) -> None:
    """Write stage.json and, last, DONE."""
    report = {
        "stage": name,
        "config": settings,
        "results": results,
        "command": sys.argv,
        "seconds": round(time.time() - started, 1),
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in _PACKAGES},
    }
    _write(folder / STAGE, report)
    (folder / DONE).touch()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _convert(recipe: Recipe, teacher: str, folder: Path) -> None:
    """Convert the teacher into `folder`, which appears whole or not at all."""
    from llamba.convert import convert

    started, partial = time.time(), folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    choice = recipe.student
    student = convert(teacher, mixer=choice.mixer, attention=recipe.student.layers(), init=choice.init, seed=recipe.seed)
    student.save_pretrained(partial)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(partial)
    conversion: Any = student.conversion
    _write(partial / "conversion.json", conversion.to_json())
    _describe(partial, "convert", overrides.to_dict(recipe)["student"], started, {})
    os.replace(partial, folder)
    del student
    gc.collect()


def _prepare_data(recipe: Recipe, teacher: str, out: Path) -> None:
    """Tokenise for every choice of targets among the stages, or check that what was tokenised is still there."""
    manifest = out / data.MANIFEST
    if (out / "data" / DONE).exists():
        for part in json.loads(manifest.read_text()).values():
            data.check_unchanged(part)
        return
    shutil.rmtree(out / "data", ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    choices = sorted({stage.targets for stage in recipe.stages})
    _write(manifest, {targets: data.prepare(recipe.data, tokenizer, targets, out / "data" / targets) for targets in choices})
    (out / "data").mkdir(exist_ok=True)
    (out / "data" / DONE).touch()


def _once(marker: Path, work: Callable[[], None]) -> None:
    """Do `work`, which leaves `marker`, in the first process; in the others wait for it."""
    deadline = time.monotonic() + _WAIT_SECONDS
    if _rank() == 0:
        work()
    while not marker.exists():
        if time.monotonic() > deadline:
            raise ValueError(f"waited {_WAIT_SECONDS // 3600} hours for the first process to finish {marker.parent}, and it did not")
        time.sleep(0.5)


def _train(recipe: Recipe, number: int, previous: Path, teacher: str, out: Path) -> Path:
    """Do stage `number` (from 1), unless it is done, and return its folder."""
    from llamba.stages import STAGES  # here, so that chat and plan need not import the trainer

    stage = recipe.stages[number - 1]
    folder = out / f"{number}-{stage.name}"
    if not (folder / DONE).exists():
        started, settings = time.time(), overrides.to_dict(recipe)["stages"][number - 1]
        results = STAGES[stage.name](stage, str(previous), teacher, Prepared(out / "data", recipe.seed), folder)
        if _rank() == 0:
            AutoTokenizer.from_pretrained(previous).save_pretrained(folder)
            _describe(folder, stage.name, settings, started, results)
    if _rank() == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder


def run(recipe: Recipe) -> Path:
    """Do what is left of a recipe, and return the last step's folder.

    Under a launcher every process calls this; conversion and tokenising are done by the first before any process group
    exists. Raises ValueError for anything wrong with the recipe, its teacher, its data, its folder or the disk.
    """
    out, teacher = Path(recipe.output), resolve_model(recipe.teacher)
    with checkpoints.disk_errors(out):
        if _rank() == 0:
            _claim(recipe, out)
        last = first = out / "0-convert"
        _once(first / DONE, lambda: None if (first / DONE).exists() else _convert(recipe, teacher, first))
        _once(out / "data" / DONE, lambda: _prepare_data(recipe, teacher, out))
        for number in range(1, len(recipe.stages) + 1):
            last = _train(recipe, number, last, teacher, out)
    return last


def _help(recipe: Recipe, source: str) -> str:
    listed = "\n".join(f"  {key}={json.dumps(value)}" for key, (value, _) in overrides.keys(recipe).items())
    return (
        f"python {source} [--plan] [key=value ...]\naccelerate launch [--config_file FILE] {source} [key=value ...]\n\n"
        f"--plan prints what the run would do and does nothing. LLAMBA_TRACEBACK=1 shows where an error came from.\n\n{listed}"
    )


def _main(recipe: Recipe, arguments: Sequence[str], source: str) -> None:
    flags = [argument for argument in arguments if argument.startswith("-")]
    if {"-h", "--help"} & set(flags):
        return print(_help(recipe, source))
    if set(flags) - {"--plan"}:
        raise ValueError(f"needed --plan, --help or key=value, got {flags[0]}")
    recipe = overrides.override(recipe, [argument for argument in arguments if argument not in flags], source)
    if flags:
        from llamba.plan import plan

        return print(plan(recipe))
    last = run(recipe)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if _rank() == 0:
        print(f"done: {last}")


def launch(recipe: Recipe) -> None:
    """Run a recipe file's recipe with the command line's overrides; the last line of every recipe file.

    A user's error ends as one line on stderr and exit status 2.
    """
    with one_line_errors():
        _main(recipe, sys.argv[1:], sys.argv[0])
