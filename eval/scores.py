"""`scores.jsonl`: one row per score, each with everything that made it."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamba.base.folders import finished, resolve_model
from llamba.base.provenance import stamp, version
from llamba.eval.foreign import LocatedRow, document, number, rows, shown, text
from llamba.eval.judge import digest, slug
from llamba.eval.stats import Interval

SCORES = "scores.jsonl"
MODELS = "models.json"
_PACKAGES = ("llamba", "torch", "transformers", "fschat", "alpaca_eval", "lm_eval", "openai")


def require_packages(*packages: str) -> None:
    """Raises ValueError where a package of the `eval` extra is not installed."""
    if missing := [package for package in packages if version(package) is None]:
        raise ValueError(f"this needs {', '.join(missing)}, not installed; pip install --constraint constraints.txt 'llamba[eval]'")


def model_name(name: str) -> str:
    """What a model is called in files: the run and its last finished stage, the folder, or the hub name."""
    path = Path(name)
    if path.is_dir() and (steps := finished(path)):
        return slug(f"{path.resolve().name}-{steps[-1].name}")
    return slug(path.resolve().name if path.is_dir() else name)


def results_folder(name: str, out: str | None) -> Path:
    """Where a model's results go: `out`, else eval/ in its run folder, else runs/eval/ and its name; notes the model in models.json.

    Raises ValueError as `resolve_model`, and for a folder whose scores or models cannot be read.
    """
    path = resolve_model(name)
    folder = Path(out) if out is not None else Path(name) / "eval" if finished(name) else Path("runs/eval") / model_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    read_scores(folder)  # what is damaged there is said now, and not after hours
    noted = folder / MODELS
    models: dict[str, Any] = dict(read_models(folder))
    models[model_name(name)] = {"path": path, "attention": attention_of(path)}
    partial = folder / f"{MODELS}.{os.getpid()}.partial"
    partial.write_text(json.dumps(models, indent=1) + "\n")
    os.replace(partial, noted)
    return folder


def read_models(folder: Path) -> dict[str, dict[str, Any]]:
    """What a folder notes of its models: `path` and `attention`. Raises ValueError, with the file's name, for what is no such note."""
    path = folder / MODELS
    found = document(path) if path.exists() else {}
    for model, note in found.items():
        if not isinstance(note, dict) or not (note.get("attention") is None or number(note["attention"]) is not None):
            raise ValueError(f"{path} must note path and attention of each model, got {shown(note)} for {shown(model)}")
    return found


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """A folder's score rows. Raises ValueError, with file and line, for a row that is none; a missing file has none."""
    path = folder / SCORES
    return [_checked(placed) for placed in rows(path)] if path.exists() else []


def _checked(placed: LocatedRow) -> dict[str, Any]:
    """A row whose names are texts and whose numbers are numbers (not a number is one too)."""
    where, row = placed
    for key in ("benchmark", "metric", "model"):
        text(placed, key)
    if not isinstance(row.get("judge"), (str, type(None))):
        raise ValueError(f"{where} must name its judge or have none, got {shown(row['judge'])}")
    for key in ("value", "low", "high", "failed", "limit", "length"):
        optional = key in ("failed", "limit") and row.get(key) is None
        if (key in row or key == "value") and not optional and not _is_number(row.get(key)):
            raise ValueError(f"{where} must have a number under {key!r}, got {shown(row.get(key))}")
    if ("low" in row) != ("high" in row):
        raise ValueError(f"{where} must have both low and high, or neither")
    cell = row.get("cell", [])
    if not isinstance(cell, list) or not all(map(_is_number, cell)):
        raise ValueError(f"{where} must have numbers under 'cell', got {shown(cell)}")
    return row | {"judge": row.get("judge")}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_items(folder: Path) -> list[dict[str, Any]]:
    """What a folder keeps of each question. Raises ValueError, with the file's name, for a file that holds no values of questions."""
    found = []
    for path in sorted((folder / "items").glob("*.json")):
        item = document(path)
        values = item.get("values")
        fine = isinstance(values, dict) and all(isinstance(v, list) and all(map(_is_number, v)) for v in values.values())
        named = all(isinstance(item.get(key), str) for key in ("benchmark", "model")) and isinstance(item.get("judge"), (str, type(None)))
        if not fine or not named:
            raise ValueError(f"{path} must hold benchmark, model, judge and the values of each question; delete it, or measure again")
        found.append(item | {"judge": item.get("judge")})
    return found


def attention_of(path: str) -> float | None:
    """Part of a model's layers that have attention; None for what is not a folder with a config."""
    config = Path(path) / "config.json"
    if not config.is_file():
        return None
    kinds = document(config).get("layer_types")
    return 1.0 if not isinstance(kinds, list) or not kinds else sum(kind != "linear_attention" for kind in kinds) / len(kinds)


def score(benchmark: str, metric: str, model: str, value: Interval | float, judge: str | None = None, **more: Any) -> dict[str, Any]:
    """A row: `benchmark`, `metric`, `model`, `judge` (None where nobody judges), value with its interval, and `more`."""
    row: dict[str, Any] = {"benchmark": benchmark, "metric": metric, "model": model, "judge": judge}
    if isinstance(value, Interval):
        row |= {"value": value.mean, "low": value.low, "high": value.high, "n": value.n}
    else:
        row["value"] = value
    return row | more


def save(folder: Path, made_rows: list[dict[str, Any]]) -> None:
    """Put rows into the folder's scores.jsonl; a row of the same benchmark, metric, model and judge is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    made = stamp(_PACKAGES)
    new = {_key(row): row | made for row in made_rows}
    path = folder / SCORES
    with (folder / f"{SCORES}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = [row for row in read_scores(folder) if _key(row) not in new]
        partial = path.with_name(f"{SCORES}.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *new.values()]))
        os.replace(partial, path)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("benchmark", "metric", "model", "judge"))


def save_items(folder: Path, benchmark: str, model: str, judge: str | None, values: Mapping[Any, Sequence[float]], **more: Any) -> None:
    """Keep each question's values in items/, so that two models can be compared question by question; `more` is kept beside them."""
    identity = {"benchmark": benchmark, "model": model, "judge": judge}
    name = "--".join(slug(part) for part in (benchmark, model, judge) if part)
    path = folder / "items" / f"{name}.json"
    if path.exists() and {key: document(path).get(key) for key in identity} != identity:  # another name that reads alike in a file name
        path = path.with_name(f"{name}-{digest(identity)[:8]}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(identity | more | {"values": {str(q): list(v) for q, v in values.items()}}) + "\n")
    os.replace(partial, path)
