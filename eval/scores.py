"""`scores.jsonl`: one row per score, each with everything that made it."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamba.base.folders import finished, resolve_model
from llamba.base.provenance import stamp, version
from llamba.eval.foreign import document
from llamba.eval.journal import read_lines
from llamba.eval.judge import digest, slug
from llamba.eval.stats import Interval

SCORES = "scores.jsonl"
MODELS = "models.json"
_PACKAGES = ("llamba", "torch", "transformers", "fschat", "alpaca_eval", "lm_eval", "openai")


def need(*packages: str) -> None:
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

    Raises ValueError as `resolve_model`.
    """
    path = resolve_model(name)
    folder = Path(out) if out is not None else Path(name) / "eval" if finished(name) else Path("runs/eval") / model_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    noted = folder / MODELS
    models = document(noted) if noted.exists() else {}
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


def save(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into the folder's scores.jsonl; a row of the same benchmark, metric, model and judge is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    made = stamp(_PACKAGES)
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
