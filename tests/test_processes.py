"""Whole runs as users start them: errors on the terminal, several processes, kills."""

import itertools
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import rms_error
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamba.running import run
from llamba.settings import Data, Distill, Hidden, Matrix, Recipe, Student
from llamba.settings.overrides import override
from llamba.training.metrics import METRICS, read_metrics

ROOT = Path(__file__).parent.parent
SHORT = dict(batch=8, micro_batch=4, precision="fp32", lr=5e-3, warmup=0, kl=1.0, ce=0.5, log_every=1, save_every=4, clip=1.0)


def environment(**more: str) -> dict[str, str]:
    fixed = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    return {**os.environ, **fixed, **more}


STAGE = ", ".join(f"{key}={value!r}" for key, value in SHORT.items())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["student.attention=1.5"], "student.attention must be a fraction from 0 to 1 or a list of layers, got 1.5"),
        (["teacher=empty"], "empty must be a model folder (with config.json) or a run folder with a finished stage, found nothing"),
        (["teacher=hollow"], "hollow"),
        (["data.train=broken.jsonl"], "broken.jsonl:1: needed one JSON object in UTF-8"),
    ],
)
def test_errors_reach_the_terminal_as_one_line(recipe_file, teacher_folder, arguments, message, monkeypatch, capsys):
    path = recipe_file(STAGE)
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "argv", ["recipe.py", *arguments])
    Path("empty").mkdir()
    Path("hollow").mkdir()
    shutil.copy(teacher_folder / "config.json", "hollow")
    Path("broken.jsonl").write_text("{\n")
    with pytest.raises(SystemExit) as caught:
        runpy.run_path("recipe.py", run_name="__main__")
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last


def launched(path: Path, name: str, *options: str) -> Path:
    """Run the recipe by itself, or under accelerate with these options, and return the stage's folder."""
    launcher = ["-m", "accelerate.commands.launch", *options] if options else []
    command = [sys.executable, *launcher, "recipe.py", f"output={name}", *CALM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=path.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    return path.parent / name / "1-distill"


ACCELERATE = ROOT / "recipes" / "accelerate"
# at ten times the rate even the order of a sum grows to 1 % in 20 steps
CALM = ["stages.0.micro_batch=2", "stages.0.lr=5e-4"]
LAUNCHERS = {
    "ddp": ["--config_file", str(ACCELERATE / "cpu_ddp.yaml")],
    "zero2": ["--config_file", str(ACCELERATE / "zero2.yaml"), "--num_processes", "2", "--mixed_precision", "no"],
    "zero3": ["--config_file", str(ACCELERATE / "zero3.yaml"), "--num_processes", "2", "--mixed_precision", "no"],
}


@pytest.mark.slow
def test_two_processes_train_as_one(recipe_file):
    """DDP, ZeRO-2 and ZeRO-3 over gloo with uneven targets: the first 20 losses of one process that accumulates twice as often."""
    path = recipe_file(STAGE + ", steps=20")
    alone = launched(path, "one")
    expected, weights = losses(alone), load_file(alone / "model.safetensors")
    assert len(expected) == 20 and expected[-1] < expected[0]
    for name, options in LAUNCHERS.items():
        folder = launched(path, name, *options)
        assert json.loads((folder / "stage.json").read_text())["results"]["processes"] == 2
        assert losses(folder) == pytest.approx(expected, rel=1e-4), name
        saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for key, value in weights.items():
            assert rms_error(saved[key], value) < 1e-3, (name, key)


ALIGNING = """
from llamba.settings import Data, Recipe, Student
from llamba import Dpo, Sft, launch

short = dict(batch=8, micro_batch=2, precision="fp32", lr=5e-4, warmup=0, log_every=1, steps=5)
pairs = Data(train={pairs!r}, eval={pairs!r}, length=48)
recipe = Recipe(
    teacher={teacher!r}, student=Student(options={{"window": 8}}), data=Data(train={chats!r}, eval={chats!r}, length=48, packing=True),
    stages=[Sft(**short), Dpo(**short, data=pairs), Dpo(**short, data=pairs, reference="teacher", precompute=False)],
    output="run",
)

if __name__ == "__main__":
    launch(recipe)
"""


@pytest.mark.slow
def test_two_processes_tune_and_prefer_as_one(tmp_path, teacher_folder, chat_file, small):
    """SFT on packed rows and DPO, over gloo: losses, rewards, held-out scores of one process that accumulates twice as often."""
    rows = [
        {"prompt": first["messages"][:1], "chosen": first["messages"][1:2], "rejected": other["messages"][1:2]}
        for first, other in zip(small.chats(24, seed=5), small.chats(24, seed=6), strict=True)
    ]
    pairs = small.write_rows(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "recipe.py").write_text(ALIGNING.format(teacher=str(teacher_folder), chats=str(chat_file), pairs=str(pairs)))
    for name, options in {"one": [], **LAUNCHERS}.items():
        launcher = ["-m", "accelerate.commands.launch", *options] if options else []
        command = [sys.executable, *launcher, "recipe.py", f"output={name}"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
    for name, stage in itertools.product(LAUNCHERS, ("1-sft", "2-dpo", "3-dpo")):
        one, two = (tmp_path / run_folder / stage for run_folder in ("one", name))
        assert json.loads((two / "stage.json").read_text())["results"]["processes"] == 2
        for line, other in zip(read_metrics(one / METRICS), read_metrics(two / METRICS), strict=True):
            missing = {"kl"} if name == "zero3" else set()  # a probe needs whole weights
            assert line.keys() - missing == other.keys()
            compared = [key for key in other if key in ("loss", "kl") or key.startswith(("rewards/", "eval_"))]
            for key in (key for key in compared if key != "rewards/accuracies" or line["step"] > 1):  # at first all margins are 0
                assert other[key] == pytest.approx(line[key], rel=1e-4, abs=1e-4), (name, stage, line["step"], key)
        weights = load_file(one / "model.safetensors")
        saved = AutoModelForCausalLM.from_pretrained(two).state_dict()
        assert all(rms_error(saved[key], weights[key]) < 1e-3 for key in weights)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / METRICS)]


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(out: Path) -> int:
    return len(read_metrics(out / "1-distill" / METRICS))


def torn(out: Path) -> bool:
    return any(not (found / "COMPLETE").exists() for found in out.glob("1-distill/checkpoints/checkpoint-*"))


POINTS = {
    "converting": lambda out: (out / "recipe.json").exists(),
    "converted": lambda out: (out / "0-convert").exists(),
    "tokenising": lambda out: (out / "data").exists(),
    "tokenised": lambda out: any((out / "data").glob("*/data.json")),
    "saving": lambda out: torn(out),
    "step 2": lambda out: steps(out) >= 2,
    "step 3": lambda out: steps(out) >= 3,
    "step 5": lambda out: steps(out) >= 5,
    "step 7": lambda out: steps(out) >= 7,
    "step 9": lambda out: steps(out) >= 9,
    "step 12": lambda out: steps(out) >= 12,
    "checkpoint 8": lambda out: (out / "1-distill" / "checkpoints" / "checkpoint-8" / "COMPLETE").exists(),
    "saved": lambda out: (out / "1-distill" / "model.safetensors").exists(),
}
FORK_SERVER = multiprocessing.get_context("forkserver")
CHAINS = (
    ("converting", "step 2", "saving", "step 7", "saving"),
    ("converted", "tokenising", "saving", "saving", "saved"),
    ("step 3", "saving", "step 9", "saving", "step 12"),
    ("tokenised", "step 5", "checkpoint 8", "saving", "saved"),
)


def kill_at(recipe: Recipe, point: str) -> tuple[int | None, bool]:
    """Run until `point` (or the last step) and kill; the exit status, and whether a checkpoint was half-written."""
    out = Path(recipe.output)
    process = FORK_SERVER.Process(target=run.run, args=(recipe,))  # a new process, without the seconds of importing
    process.start()
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if POINTS[point](out) or (point == "saving" and steps(out) >= 12):
            process.kill()
        time.sleep(0.0005)
    process.kill()
    process.join()
    return process.exitcode, torn(out)


@pytest.mark.slow
def test_killed_runs_end_with_the_same_weights(recipe_file, monkeypatch):
    """Twenty SIGKILLs in four runs, five each, some in the midst of a checkpoint; then the same command finishes."""
    path = recipe_file(STAGE + ", steps=12")
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    FORK_SERVER.set_forkserver_preload(["llamba.stages", "llamba.models.convert"])

    def chain(number: int) -> list[tuple[int | None, bool]]:
        arguments = [f"output={path.parent / f'run{number}'}", "stages.0.save_every=2"]
        recipe = override(runpy.run_path(str(path))["recipe"], arguments, path.name)
        kills = [kill_at(recipe, point) for point in CHAINS[number]] if number < len(CHAINS) else []
        done = subprocess.run([sys.executable, path.name, *arguments], capture_output=True, text=True, env=environment(), cwd=path.parent)
        assert done.returncode == 0, done.stderr
        return kills

    with ThreadPoolExecutor(2) as pool:
        kills = [kill for chained in pool.map(chain, range(len(CHAINS) + 1)) for kill in chained]
    assert [status for status, _ in kills] == [-signal.SIGKILL] * 20
    assert sum(half_written for _, half_written in kills) >= 3
    whole = path.parent / f"run{len(CHAINS)}" / "1-distill"
    for number in range(len(CHAINS)):
        parts = path.parent / f"run{number}" / "1-distill"
        assert same(whole, parts), CHAINS[number]
        assert [line["loss"] for line in read_metrics(whole / METRICS)] == [line["loss"] for line in read_metrics(parts / METRICS)]
        assert not list(parts.parent.rglob("*.partial")) and not (parts / "checkpoints").exists()


THREE = ("1-matrix", "2-hidden", "3-distill")


def kill_soon(recipe: Recipe, stage: str, step: int, pause: float) -> int | None:
    """Run until a stage has logged `step` steps, a little longer, and kill; the exit status."""
    out = Path(recipe.output)
    process = FORK_SERVER.Process(target=run.run, args=(recipe,))
    process.start()
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline and len(read_metrics(out / stage / METRICS)) < step:
        time.sleep(0.0005)
    time.sleep(pause)
    process.kill()
    process.join()
    return process.exitcode


@pytest.mark.slow
def test_stages_killed_at_random_points_end_with_the_same_weights(tmp_path, monkeypatch, teacher_folder, chat_file):
    """matrix (whose sampled rows must be the same again), hidden, distill, all over one stream: two SIGKILLs in each, at random steps."""
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    FORK_SERVER.set_forkserver_preload(["llamba.stages", "llamba.models.convert", "llamba.running.preflight"])
    short = dict(batch=8, micro_batch=4, precision="fp32", lr=2e-3, warmup=0, log_every=1, save_every=2, clip=1.0, steps=9)
    stages = [Matrix(**short, squared=True, rows=9), Hidden(**short, target="block"), Distill(**short, kl=1.0, ce=0.0)]
    data = Data(train=str(chat_file), length=48, streaming=True)
    whole = Recipe(str(teacher_folder), Student(), data, stages, str(tmp_path / "whole"))
    parts, rng = replace(whole, output=str(tmp_path / "parts")), random.Random()
    points = [(stage, rng.randint(1, 8), rng.uniform(0, 0.1)) for stage in THREE for _ in range(2)]
    statuses = [kill_soon(parts, *point) for point in points]
    assert statuses == [-signal.SIGKILL] * len(points), points
    for recipe in (parts, whole):
        last = FORK_SERVER.Process(target=run.run, args=(recipe,))
        last.start()
        last.join()
        assert last.exitcode == 0
    for stage in THREE:
        one, two = (Path(recipe.output) / stage for recipe in (whole, parts))
        assert same(one, two), (stage, points)
        assert [line["loss"] for line in read_metrics(one / METRICS)] == [line["loss"] for line in read_metrics(two / METRICS)], points
