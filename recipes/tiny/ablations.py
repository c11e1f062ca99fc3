"""The papers' ablations on the embedded teacher: stages, initialisation, frozen MLPs, stepwise conversion.

python recipes/tiny/ablations.py [--steps 160] [--seeds 3] [--only NAME ...] [--processes 2]

Protocol: every arm trains for the same number of steps of the same size. Its learning rate is the one of RATES whose run
with TUNING_SEED has the lowest held-out KL; then it runs with other seeds. Runs are kept in --out, and the same command
goes on with what is missing.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo import mean, score, write_conversations
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from llamba.data.batches import Rows, collate
from llamba.data.tokens import tokenize
from llamba.running.run import run
from llamba.settings import Data, Distill, Hidden, Matrix, Recipe, Stage, Student
from llamba.stages import distill

HERE = Path(__file__).parent
RATES = (3e-3, 1e-2, 3e-2)
TUNING_SEED = 100
LENGTH, BATCH, HELD_OUT = 256, 8, 64
COMMON: dict[str, Any] = dict(betas=(0.9, 0.98), clip=1.0, warmup=10, batch=BATCH, micro_batch=BATCH, save_every=10**6, log_every=40)


def _distill(steps: int, lr: float, **more: Any) -> Distill:
    return Distill(**{**COMMON, "kl": 1.0, "ce": 0.1, "lr": lr, "steps": steps, **more})


def _hidden(steps: int, lr: float) -> Hidden:
    return Hidden(**{**COMMON, "lr": lr, "steps": steps})


def _matrix(steps: int, lr: float) -> Matrix:
    return Matrix(**{**COMMON, "lr": lr, "steps": steps})


def _parts(steps: int, *parts: float) -> list[int]:
    return [round(steps * part) for part in parts]


def _two(steps: int, lr: float) -> list[Stage]:
    a, b = _parts(steps, 0.4, 0.6)
    return [_hidden(a, lr), _distill(b, lr)]


def _three(steps: int, lr: float) -> list[Stage]:
    a, b, c = _parts(steps, 0.1, 0.3, 0.6)
    return [_matrix(a, lr), _hidden(b, lr), _distill(c, lr)]


ORDER = (0, 2, 4, 6, 1, 5)  # of stepwise conversion to a quarter, as Mamba-in-Llama's: every second layer, then every fourth


def _stepwise(steps: int, lr: float) -> list[Stage]:
    left = [[layer for layer in range(8) if layer not in ORDER[:done]] for done in range(2, len(ORDER) + 1)]
    (first, *rest) = [_distill(steps // len(ORDER), lr) for _ in ORDER]
    return [first, *(Distill(**{**vars(stage), "attention": kept}) for stage, kept in zip(rest, left, strict=True))]


@dataclass(frozen=True)
class Arm:
    """One row of a table: what the teacher becomes, and the stages for a number of steps and a learning rate."""

    student: Student
    stages: Callable[[int, float], list[Stage]]


ARMS = {
    "stages 2": Arm(Student(mixer="mamba2", attention=0.0), lambda steps, lr: [_hidden(steps, lr)]),
    "stages 3": Arm(Student(mixer="mamba2", attention=0.0), lambda steps, lr: [_distill(steps, lr)]),
    "stages 2, 3": Arm(Student(mixer="mamba2", attention=0.0), _two),
    "stages 1, 2, 3": Arm(Student(mixer="mamba2", attention=0.0), _three),
    "attention's weights, MLPs frozen": Arm(Student(mixer="mamba2", attention=0.5), lambda steps, lr: [_distill(steps, lr)]),
    "attention's weights, MLPs trained": Arm(Student(mixer="mamba2", attention=0.5), lambda steps, lr: [_distill(steps, lr, train="all")]),
    "random weights, MLPs frozen": Arm(Student(mixer="mamba2", attention=0.5, init="random"), lambda steps, lr: [_distill(steps, lr)]),
    "random weights, MLPs trained": Arm(
        Student(mixer="mamba2", attention=0.5, init="random"), lambda steps, lr: [_distill(steps, lr, train="all")]
    ),
    "quarter in one shot": Arm(Student(mixer="mamba2", attention=0.25), lambda steps, lr: [_distill(steps, lr)]),
    "quarter, layer by layer": Arm(Student(mixer="mamba2", attention=[layer for layer in range(8) if layer != ORDER[0]]), _stepwise),
}
# what the papers found: the first arm is better than the second
CLAIMS = (
    ("stages 3", "stages 2", "MOHAWK, Table 2: 54.5 against 53.3"),
    ("stages 2, 3", "stages 3", "MOHAWK, Table 2: 62.3 against 54.5"),
    ("stages 1, 2, 3", "stages 2, 3", "MOHAWK, Table 2: 62.7 against 62.3"),
    ("attention's weights, MLPs frozen", "random weights, MLPs frozen", "Mamba-in-Llama, Table 7: perplexity 2.09 against 7.4"),
    ("attention's weights, MLPs trained", "random weights, MLPs trained", "Mamba-in-Llama, Table 7: 9.1 against 11.2"),
    ("attention's weights, MLPs frozen", "attention's weights, MLPs trained", "Mamba-in-Llama, Table 7: 2.09 against 9.1"),
    ("quarter, layer by layer", "quarter in one shot", "Mamba-in-Llama, Table 7: 2.20 against 2.29"),
)


@torch.inference_mode()
def held_out_kl(model: Any, teacher: Any, rows: Rows) -> float:
    """Mean KL(teacher || student) on held-out rows, nats per target token."""
    stage, total, targets = _distill(1, 1.0, ce=0.0), 0.0, 0
    for start in range(0, len(rows), BATCH):
        batch = collate([rows[index] for index in range(start, min(start + BATCH, len(rows)))], 0)
        sums = distill.objective(stage, model, teacher, batch)
        total, targets = total + sums.kl.item(), targets + int(sums.targets)
    return total / targets


def do(name: str, lr: float, seed: int, steps: int, out: Path) -> None:
    """One run and its scores, unless they are there."""
    folder = out / f"{name.replace(' ', '_')}-{lr:g}-{seed}"
    if (folder / "scores.json").exists():
        return
    arm = ARMS[name]
    recipe = Recipe(
        teacher=str(HERE / "teacher"), student=arm.student, data=Data(train=str(out / "train.jsonl"), length=LENGTH),
        stages=arm.stages(steps, lr), output=str(folder), seed=seed,
    )  # fmt: skip
    last = run(recipe)
    tokenizer = AutoTokenizer.from_pretrained(last)
    model, teacher = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (last, HERE / "teacher"))
    rows = Rows(out / "held_out" / "train")
    result = {"kl": held_out_kl(model, teacher, rows), "exact": mean(score(model, tokenizer, per_skill=20))}
    for step in folder.glob("*-*/model.safetensors"):
        step.unlink()
    (folder / "scores.json").write_text(json.dumps(result) + "\n")


def read(out: Path, name: str, lr: float, seed: int) -> dict[str, float]:
    """A run's scores."""
    found: dict[str, float] = json.loads((out / f"{name.replace(' ', '_')}-{lr:g}-{seed}" / "scores.json").read_text())
    return found


def best_rate(out: Path, name: str) -> float:
    """The arm's learning rate."""
    return min(RATES, key=lambda lr: read(out, name, lr, TUNING_SEED)["kl"])


def verdict(better: list[float], worse: list[float]) -> str:
    """Of paired held-out KLs: whether the first arm's is lower, by more than two standard errors."""
    differences = [b - w for b, w in zip(better, worse, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    if abs(statistics.mean(differences)) <= 2 * error:
        return "cannot tell"
    return "agrees" if statistics.mean(differences) < 0 else "disagrees"


def report(out: Path, names: list[str], seeds: int) -> str:
    """The table of arms and the table of claims, in Markdown."""
    runs = {name: [read(out, name, best_rate(out, name), seed) for seed in range(seeds)] for name in names}

    def cell(values: list[float], scale: float, digits: int) -> str:
        error = statistics.stdev(values) / math.sqrt(len(values))
        return f"{scale * statistics.mean(values):.{digits}f} ± {scale * error:.{digits}f}"

    lines = ["| arm | lr | held-out KL | exact answers, % |", "|---|---|---|---|"]
    for name, results in runs.items():
        kl, exact = ([result[key] for result in results] for key in ("kl", "exact"))
        lines.append(f"| {name} | {best_rate(out, name):g} | {cell(kl, 1, 3)} | {cell(exact, 100, 1)} |")
    lines += ["", "| better, says the paper | than | source | here |", "|---|---|---|---|"]
    for better, worse, source in CLAIMS:
        if better in runs and worse in runs:
            found = verdict(*([result["kl"] for result in runs[name]] for name in (better, worse)))
            lines.append(f"| {better} | {worse} | {source} | {found} |")
    return "\n".join(lines)


def _prepare(out: Path, steps: int) -> None:
    write_conversations(out / "train.jsonl", steps * BATCH, LENGTH)
    write_conversations(out / "held_out.jsonl", HELD_OUT, LENGTH, seed=7)
    if not (out / "held_out").exists():
        tokenizer = AutoTokenizer.from_pretrained(HERE / "teacher")
        tokenize(Data(train=str(out / "held_out.jsonl"), length=LENGTH), tokenizer, "assistant", out / "held_out")


def main() -> None:
    """Do what is missing, each run in a process of its own, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(ARMS), choices=list(ARMS), metavar="NAME")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("NAME", "LR", "SEED"), help="do one run and print nothing")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.one:
        name, lr, seed = args.one
        return do(name, float(lr), int(seed), args.steps, args.out)
    _prepare(args.out, args.steps)

    def apart(name: str, lr: float, seed: int) -> None:
        command = [sys.executable, __file__, "--out", str(args.out), "--steps", str(args.steps), "--one", name, str(lr), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(f"{name}, lr {lr:g}, seed {seed}: {done.stderr[-2000:]}")
        print(f"{name}, lr {lr:g}, seed {seed}: {read(args.out, name, lr, seed)}", flush=True)

    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(lambda job: apart(*job), [(name, lr, TUNING_SEED) for name in args.only for lr in RATES]))
        jobs = [(name, best_rate(args.out, name), seed) for seed in range(args.seeds) for name in args.only]
        list(pool.map(lambda job: apart(*job), jobs))
    print(report(args.out, args.only, args.seeds))


if __name__ == "__main__":
    main()
