"""What `make real` shows of each model: perplexity and distance to the teacher on held-out chats, recall, memory, speed; two pictures.

Shapes: T tokens of a chat, V vocabulary.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llamba.base.axes import plain, scale_y
from llamba.base.folders import finished
from llamba.eval.answerer import Answerer, Settings
from llamba.eval.lengths import cache_bytes
from llamba.eval.recall import Options
from llamba.eval.recall import measure as recall
from llamba.speculative import generate
from llamba.training.metrics import METRICS, read_metrics

LATE = 256  # tokens behind this position are shown apart: what the window cannot see matters there
NAMES = (4, 8, 16)  # entries of the phone book
CONTEXTS = (512, 4096)


@dataclass(frozen=True)
class Distance:
    """Means over the tokens of held-out chats: negative log-likelihood and KL(teacher || model) in nats, the latter behind LATE too."""

    nll: float
    kl: float
    late: float


class Reference(NamedTuple):
    """A chat, and what the teacher expects of each next token."""

    tokens: Tensor  # [1, T]
    expected: Tensor  # logarithms of probabilities, [T - 1, V]


@torch.inference_mode()
def expected(model: Any, tokens: Tensor) -> Tensor:
    """Logarithms of a model's probabilities of each next token [T - 1, V], for tokens [1, T]."""
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits[0, :-1].float().log_softmax(-1)


def references(teacher: Any, chats: Sequence[list[int]]) -> list[Reference]:
    """The teacher's side of `distance`, which is computed once for all students: T x V numbers a chat."""
    return [Reference(tokens, expected(teacher, tokens)) for tokens in (torch.tensor([ids]) for ids in chats)]


@torch.inference_mode()
def distance(model: Any, chats: Sequence[Reference]) -> Distance:
    """How far a model is from its teacher on chats of equal length T."""
    sums = torch.zeros(3, dtype=torch.float64)
    for tokens, theirs in chats:
        own = expected(model, tokens)
        kl = (theirs.exp() * (theirs - own)).sum(-1)
        nll = -own.gather(1, tokens[0, 1:, None]).mean()
        sums += torch.stack((nll, kl.mean(), kl[LATE:].mean())).double()
    return Distance(*(sums / len(chats)).tolist())


def recalled(folder: str, trials: int = 10) -> dict[int, float]:
    """Per cent of phone numbers found, by the number of names."""
    settings = Settings(batch=trials, max_new_tokens=16, dtype="bfloat16")
    found = recall(Answerer(folder, settings), Options(tasks=("phone",), names=NAMES, trials=trials))["phone"]
    return {n: sum(one.value for trial in made for one in trial) / sum(map(len, made)) for (n,), made in found.items()}


@torch.inference_mode()
def cache_mib(model: Any, length: int) -> float:
    """MiB of the cache behind so many tokens, a batch of one."""
    out = model(torch.zeros(1, length, dtype=torch.long), use_cache=True, logits_to_keep=1)
    return cache_bytes(out.past_key_values) / 2**20


def speed(model: Any, prompts: Sequence[list[int]], draft: Any = None, new: int = 64) -> float:
    """Tokens per second of our decoding at batch 1, greedy, the prompts' prefill included."""
    made, start = 0, time.perf_counter()
    for ids in prompts:
        out = generate(model, torch.tensor([ids]), draft=draft, max_new_tokens=new)
        made += out.sequences.shape[1] - len(ids)
    return made / (time.perf_counter() - start)


def table(rows: dict[str, dict[str, float | None]]) -> str:
    """One line per measure, one column per model; a dash where a measure says nothing."""
    columns = list(rows)
    measures = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [f"{'':<38}" + "".join(f"{name:>19}" for name in columns)]
    for key in measures:
        cells = (rows[name].get(key) for name in columns)
        lines.append(f"{key:<38}" + "".join(f"{'-' if cell is None else f'{cell:.4g}':>19}" for cell in cells))
    return "\n".join(lines)


def pictures(runs: dict[str, Path], starts: dict[str, float], ends: dict[str, float], path: Path) -> None:
    """KL to the teacher against trained tokens, a line per student: while it is trained, and what it is on held-out chats."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for (name, run), colour in zip(runs.items(), ("tab:blue", "tab:orange"), strict=True):
        before, points = 0.0, []
        for step in finished(run):
            lines = [line for line in read_metrics(step / METRICS) if "kl" in line] if (step / METRICS).exists() else []
            points += [(before + line["tokens"], line["kl"]) for line in lines]
            before = points[-1][0] if lines else before
        axes.plot(*zip(*points, strict=True), color=colour, label=f"{name}, in training")
        axes.plot([0], [starts[name]], "o", color=colour, label=f"{name}, held out, untrained and trained")
        axes.plot([points[-1][0]], [ends[name]], "o", color=colour)
    axes.set(xlabel="tokens distilled on", ylabel="KL to the teacher, nats per token")
    scale_y(axes, [float(value) for line in axes.lines for value in np.asarray(line.get_ydata())])
    axes.xaxis.set_major_formatter(plain)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def save(path: Path, report: dict[str, Any]) -> None:
    """The report as JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(path)
