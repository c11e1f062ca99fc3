"""`scores.jsonl`: one row per score, each with everything that made it."""

import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llamba.eval.journal import read_lines
from llamba.eval.judge import slug
from llamba.eval.stats import Interval
from llamba.folders import finished, resolve_model

SCORES = "scores.jsonl"
MODELS = "models.json"
_PACKAGES = ("llamba", "torch", "transformers", "fschat", "alpaca_eval", "lm_eval", "openai")


def version(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def need(*packages: str) -> None:
    """Raises ValueError where a package of the `eval` extra is not installed."""
    if missing := [package for package in packages if version(package) is None]:
        raise ValueError(f"this needs {', '.join(missing)}, not installed; pip install --constraint constraints.txt 'llamba[eval]'")


def commit() -> str | None:
    """Commit of this code where it runs from a checkout, with + for uncommitted changes."""
    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def hardware() -> str:
    """The accelerator's name, or the processor and its threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def stamp() -> dict[str, Any]:
    """What made a row: commit, command, versions, hardware, date."""
    return {
        "commit": commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | {p: v for p in _PACKAGES if (v := version(p))},
        "hardware": hardware(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def model_name(name: str) -> str:
    """What a model is called in files: the run and its last finished stage, the folder, or the hub name."""
    path = Path(name)
    if path.is_dir() and (steps := finished(path)):
        return slug(f"{path.resolve().name}-{steps[-1].name}")
    return slug(path.resolve().name if path.is_dir() else name)


def results_folder(name: str, out: str | None) -> Path:
    """Where a model's results go: `out`, else eval/ in its run folder, else runs/eval/ and its name; notes the model in models.json.

    Raises ValueError as `resolve_model`.
    """
    path = resolve_model(name)
    folder = Path(out) if out is not None else Path(name) / "eval" if finished(name) else Path("runs/eval") / model_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    noted = folder / MODELS
    models = json.loads(noted.read_text()) if noted.exists() else {}
    models[model_name(name)] = {"path": path, "attention": attention_of(path)}
    partial = folder / f"{MODELS}.{os.getpid()}.partial"
    partial.write_text(json.dumps(models, indent=1) + "\n")
    os.replace(partial, noted)
    return folder


def attention_of(path: str) -> float | None:
    """Part of a model's layers that have attention; None for what is not a folder with a config."""
    config = Path(path) / "config.json"
    if not config.is_file():
        return None
    kinds = json.loads(config.read_text()).get("layer_types")
    return 1.0 if not kinds else sum(kind != "linear_attention" for kind in kinds) / len(kinds)


def score(benchmark: str, metric: str, model: str, value: Interval | float, judge: str | None = None, **more: Any) -> dict[str, Any]:
    """A row: `benchmark`, `metric`, `model`, `judge` (None where nobody judges), value with its interval, and `more`."""
    row: dict[str, Any] = {"benchmark": benchmark, "metric": metric, "model": model, "judge": judge}
    if isinstance(value, Interval):
        row |= {"value": value.mean, "low": value.low, "high": value.high, "n": value.n}
    else:
        row["value"] = value
    return row | more


def save(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into the folder's scores.jsonl; a row of the same benchmark, metric, model and judge is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    made = stamp()
    new = {_key(row): row | made for row in rows}
    path = folder / SCORES
    with (folder / f"{SCORES}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = [row for row in read_lines(path) if _key(row) not in new]
        partial = path.with_name(f"{SCORES}.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *new.values()]))
        os.replace(partial, path)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("benchmark", "metric", "model", "judge"))


def save_items(folder: Path, benchmark: str, model: str, judge: str | None, values: Mapping[Any, Sequence[float]]) -> None:
    """Keep each question's values in items/, so that two models can be compared question by question."""
    name = "--".join(filter(None, (benchmark, model, judge)))
    made = {"benchmark": benchmark, "model": model, "judge": judge, "values": {str(q): list(v) for q, v in values.items()}}
    path = folder / "items" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(made) + "\n")
    os.replace(partial, path)
