"""`metrics.jsonl`: one line per logged optimizer step, on disk and on the terminal."""

import json
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llamba.base.foreign import reading
from llamba.data.batches import Ordered

METRICS = "metrics.jsonl"
LAYERS = "layers/"  # what a layer's own number is logged under, before the layer's
_NO_PARTS = ("epoch", "learning_rate", "num_tokens")
_SHOWN = ("loss", "kl", "ce", "mean_token_accuracy", "rewards/margins", "rewards/accuracies")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off is left out, a missing file has none.

    Raises ValueError, with file and line, for one that is no object with a step.
    """
    if not path.exists():
        return []
    return [_line(f"{path}:{number}", line) for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1)]


def _line(where: str, line: bytes) -> dict[str, Any]:
    with reading(f"{where} must be a JSON object"):
        found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be a JSON object, got {str(found)[:60]}")
    layers = found.get("layers", {})
    fine = type(found.get("step")) is int and found["step"] >= 0 and isinstance(found.get("tokens", 0), (int, float))
    if not fine or not isinstance(layers, dict) or not all(layer.isdecimal() for layer in layers):
        raise ValueError(f"{where} must have a step (and tokens and layers as numbers, if any), got {str(found)[:60]}; delete the line")
    return found


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, and the held-out scores: they will be written again."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step and "loss" in line]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)


def append_metrics(path: Path, line: dict[str, Any]) -> None:
    """Add one line."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _show(line: dict[str, Any], steps: int, left: float) -> str:
    numbers = "  ".join(f"{key} {line[key]:.4f}" for key in _SHOWN if key in line)
    speed = f"lr {line['lr']:.2e}  {line['tokens_per_s']:,.0f} tok/s  {int(left) // 60}:{int(left) % 60:02d} left"
    return f"step {line['step']}/{steps}  {numbers}  {speed}"


class Metrics(TrainerCallback):
    """Writes the loss and its parts (per target token; of single layers under `layers`), lr, gradient norm, tokens, tokens per second."""

    def __init__(self, path: Path, rows: Ordered) -> None:
        self.path, self.rows = path, rows
        self.step, self.time = 0, 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.step, self.time = state.global_step, time.monotonic()
        if state.is_world_process_zero:
            _keep_until(self.path, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= state.global_step == state.max_steps

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        """Write and show a training line; the Trainer's closing summary, which has no loss, is left out."""
        if "loss" not in logs or not state.is_world_process_zero:
            return
        now, tokens = time.monotonic(), self.rows.tokens_at(state.global_step)
        seconds, steps = now - self.time, state.global_step - self.step
        line: dict[str, Any] = {"step": state.global_step}
        line |= {key: value for key, value in logs.items() if key not in _NO_PARTS and not key.startswith(LAYERS)}
        layers = {key.removeprefix(LAYERS): value for key, value in logs.items() if key.startswith(LAYERS)}
        line |= {"layers": layers} if layers else {}
        line |= {"lr": logs["learning_rate"], "tokens": tokens}
        line["tokens_per_s"] = round((tokens - self.rows.tokens_at(self.step)) / seconds, 1)
        append_metrics(self.path, line)
        print(_show(line, state.max_steps, seconds / steps * (state.max_steps - state.global_step)), flush=True)
        self.step, self.time = state.global_step, now
