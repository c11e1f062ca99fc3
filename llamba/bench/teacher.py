"""`llamba bench teacher`: a chat model distilled into a hybrid for so many minutes, and how far it is from its teacher on the way.

With `--pack`, the model and the tokenised chats that `recipes/real/carry.py` packed; without, random weights of SmolLM2-135M's shape and
random tokens, divided by `--shrink`. Half of the layers are converted (mixer "auto"); first the mixers learn each layer's output (MOHAWK,
stage 2), then the whole learns the teacher's distribution, with the mixers alone trained. The time is what is given, so each phase's
learning rate follows the clock. Weights are fp32, products in `--dtype`. Shapes: B sequences, T tokens of each.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamba.base.devices import meant
from llamba.base.provenance import append_row
from llamba.bench.pieces import joined
from llamba.bench.shapes import build
from llamba.bench.train import DTYPES
from llamba.data.batches import Batch, Ordered, Rows, collate
from llamba.data.tokens import append, pack
from llamba.models.convert import convert
from llamba.models.documents import attend_by_document
from llamba.models.loading import load_model
from llamba.models.published import teacher_config
from llamba.settings import Distill, Hidden
from llamba.stages import distill, hidden
from llamba.training.learnable import freeze

SHAPE, MODEL, ROWS = "smollm2-135m", "teacher.gguf", "rows"  # the model's shape; the files of a pack
ALIGNING = 0.3  # of the time
WARMUP, FLOOR = 0.03, 0.05  # of a phase's time; of its learning rate
STEPS = 20_000  # more than any run takes
ALIGN = Hidden(lr=3e-3, targets="all")
DISTIL = Distill(kl=1.0, ce=0.0, lr=1e-3, targets="all")


@dataclass(frozen=True)
class Plan:
    """When training ends (on the clock of `time.perf_counter`), sequences of a step, held-out sequences, seconds from one row to the next,
    and what is computed in."""

    ends: float
    batch: int
    held_out: int
    every: float
    dtype: torch.dtype
    device: str


def random_rows(folder: Path, vocabulary: int, length: int, sequences: int) -> None:
    """Rows of random tokens, several documents in each, as `llamba.data.batches` reads them."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 4 * sequences), ("eval", sequences)):
        (folder / split).mkdir(parents=True)
        lengths = draw.integers(length // 4, length, 2 * count).tolist()
        packs = pack(lengths, length)
        own = [lengths[index] for group in packs for index in group]
        targets = np.concatenate([np.arange(each) > 0 for each in own])
        append(folder / split, "tokens", draw.integers(3, vocabulary, sum(own)), np.int32)
        append(folder / split, "targets", targets, np.uint8)
        append(folder / split, "lengths", own, np.int64)
        append(folder / split, "packs", [len(group) for group in packs], np.int64)


def sources(packed: list[str], shrink: int, work: Path) -> tuple[Any, dict[str, Rows]]:
    """The teacher in fp32 on the CPU, and the rows of "train" and "eval": of a pack, which is put together beside its first piece, or
    random, in `work`. Raises ValueError for pieces that are not whole."""
    if packed:
        work = Path(packed[0]) / "whole"
        if not work.is_dir():
            joined(map(Path, packed), work)
        teacher = load_model(work / MODEL, torch.float32)
    else:
        teacher = build(teacher_config(SHAPE), shrink, torch.float32, "cpu")
        random_rows(work / ROWS, teacher.config.vocab_size, max(512 // shrink, 32), 4)
    return teacher, {split: Rows(work / ROWS / split) for split in ("train", "eval")}


def share_of_rate(passed: float) -> float:
    """What part of the learning rate counts where `passed` of a phase's time has passed: up at first, then down along a cosine."""
    if passed < WARMUP:
        return passed / WARMUP
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min((passed - WARMUP) / (1 - WARMUP), 1))) / 2


def _batches(rows: Rows, plan: Plan) -> Iterator[Batch]:
    order = Ordered(rows, plan.batch, 0, epochs=1, steps=STEPS, tokens=None)
    for step in range(STEPS):
        yield _batch([order[step * plan.batch + place] for place in range(plan.batch)], plan.device)


def _batch(items: list[Any], device: str) -> Batch:
    return {name: value.to(device, non_blocking=True) for name, value in collate(items, 0).items()}


@torch.no_grad()
def distance(student: Any, teacher: Any, rows: Rows, plan: Plan) -> float:
    """KL(teacher || student) on held-out rows, nats per token."""
    student.eval()
    total = torch.zeros(2, dtype=torch.float64, device=plan.device)
    for first in range(0, min(plan.held_out, len(rows)), plan.batch):
        batch = _batch([rows[index] for index in range(first, min(first + plan.batch, plan.held_out, len(rows)))], plan.device)
        with torch.autocast(torch.device(plan.device).type, plan.dtype, enabled=plan.dtype != torch.float32):
            sums = distill.objective(DISTIL, student, teacher, batch)
        total += torch.stack((sums.kl.double(), sums.targets.double()))
    student.train()
    return (total[0] / total[1]).item()


class Training:
    """The student on its way: steps of a phase, counts, and rows through `write`."""

    def __init__(self, student: Any, teacher: Any, rows: dict[str, Rows], plan: Plan, write: Callable[[dict[str, Any]], None]):
        self.student, self.teacher, self.rows, self.plan, self.write = student, teacher, rows, plan, write
        self.batches = _batches(rows["train"], plan)
        self.weights = [weight for weight in student.parameters() if weight.requires_grad]
        self.tokens, self.steps, self.started = 0, 0, time.perf_counter()

    def tell(self, phase: str, loss: float | None, since: tuple[float, int]) -> None:
        """One row: the distance now, and the speed since a time and a number of tokens. Raises ValueError where it is not finite."""
        now = time.perf_counter()
        kl = distance(self.student, self.teacher, self.rows["eval"], self.plan)
        if not math.isfinite(kl):
            raise ValueError(f"the distance to the teacher must be finite, got {kl} after {self.steps} steps of training")
        speed = (self.tokens - since[1]) / max(now - since[0], 1e-9)
        self.write({"phase": phase, "seconds": now - self.started, "steps": self.steps, "tokens": self.tokens, "loss": loss,
                    "held_out_kl": kl, "tokens_per_second": speed})  # fmt: skip

    def phase(self, name: str, objective: Callable[..., Any], lr: float, seconds: float) -> None:
        """Train for so many seconds; at least one step."""
        optimizer = torch.optim.AdamW(self.weights, lr=lr, betas=(0.9, 0.95), weight_decay=DISTIL.weight_decay)
        begun, told, summed = time.perf_counter(), (time.perf_counter(), self.tokens), []
        passed = 0.0
        while passed < 1:
            for group in optimizer.param_groups:
                group["lr"] = lr * share_of_rate(passed)
            batch = next(self.batches)
            summed.append(self._step(objective, optimizer, batch))
            self.steps, self.tokens = self.steps + 1, self.tokens + batch["input_ids"].numel()
            if self.steps % 8 == 0:
                summed[-1].item()  # the clock is the device's, too
            passed = (time.perf_counter() - begun) / max(seconds, 1e-9)
            if passed >= 1 or time.perf_counter() - told[0] > self.plan.every:
                self.tell(name, torch.stack(summed).mean().item(), told)
                told, summed = (time.perf_counter(), self.tokens), []

    def _step(self, objective: Callable[..., Any], optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
        with torch.autocast(torch.device(self.plan.device).type, self.plan.dtype, enabled=self.plan.dtype != torch.float32):
            sums = objective(self.student, self.teacher, batch)
        loss: Tensor = sums.loss / sums.targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def train(teacher: Any, rows: dict[str, Rows], plan: Plan, write: Callable[[dict[str, Any]], None]) -> None:
    """Convert the teacher and train what came out, with a row before, in between and behind."""
    student = convert(teacher, mixer="auto", attention=0.5).to(plan.device).train()
    teacher = teacher.to(plan.device, plan.dtype).requires_grad_(False).eval()
    freeze(student, "mixers")
    for model in (student, teacher):
        attend_by_document(model)
    training = Training(student, teacher, rows, plan, write)
    training.tell("untrained", None, (time.perf_counter(), 0))
    training.phase("hidden", partial(hidden.objective, ALIGN), ALIGN.lr, ALIGNING * (plan.ends - time.perf_counter()))
    training.phase("distill", partial(distill.objective, DISTIL), DISTIL.lr, plan.ends - time.perf_counter())


def main(args: argparse.Namespace) -> None:
    """Print the curve; with `--out`, append its rows. The minutes begin with the command, so that loading counts."""
    began, device = time.perf_counter(), meant(args.device)
    cuda, about = device.startswith("cuda"), {"bench": "teacher", "device": device, "shrink": args.shrink, "dtype": args.dtype}
    about["model"] = "package:smollm2-135m-instruct" if args.pack else f"{SHAPE}, random"

    def write(row: dict[str, Any]) -> None:
        loss = "" if row["loss"] is None else f"   loss {row['loss']:.4g}"
        print(f"{row['phase']:<10}{row['seconds']:7.1f} s {row['tokens']:12,} tokens   held-out KL {row['held_out_kl']:.4f}"
              f"   {row['tokens_per_second']:,.0f} tokens/s{loss}", flush=True)  # fmt: skip
        if args.out:
            append_row(args.out, about | row)

    with tempfile.TemporaryDirectory() as work:
        teacher, rows = sources(args.pack, args.shrink, Path(work))
        batch, held_out, every = (32, 64, 20.0) if cuda else (2, 4, 20 * args.minutes)
        train(teacher, rows, Plan(began + 60 * args.minutes, batch, held_out, every, DTYPES[args.dtype], device), write)
