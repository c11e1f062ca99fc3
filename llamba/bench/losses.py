"""`llamba bench losses`: distillation's loss from hidden states, in chunks and with whole logits; forward and backward.

Shapes: T = 4,096 tokens, D = 1,024 (teacher and student), V = 128,256; fp32, forward KL and cross-entropy, head trained.
Every measurement is one call in a process of its own, the two sides in turn; memory is the peak beyond inputs, weights
and the head's own gradient.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llamba.base.provenance import append_row
from llamba.bench.memory import forget_peak, mib
from llamba.training.losses import Mix, head_sums, loss_sums

T, D, V = 4096, 1024, 128256
THREADS = 2
MIX: dict[str, Any] = {"kl": 0.9, "ce": 0.1, "temperature": 1.0}

Loss = Callable[[Tensor, Tensor, nn.Linear, nn.Linear, Tensor], Tensor]


def _fused(hidden: Tensor, teacher_hidden: Tensor, head: nn.Linear, teacher_head: nn.Linear, labels: Tensor) -> Tensor:
    return head_sums(hidden, teacher_hidden, head, teacher_head, labels, **MIX).loss


def _naive(hidden: Tensor, teacher_hidden: Tensor, head: nn.Linear, teacher_head: nn.Linear, labels: Tensor) -> Tensor:
    """As lean as whole logits can be: every position but the last is a target, so none has to be picked out."""
    with torch.no_grad():
        teacher = teacher_head(teacher_hidden[0, :-1])
    kl, ce = loss_sums(Mix(**MIX), head(hidden[0, :-1]), teacher, labels[0, 1:])
    return MIX["kl"] * kl + MIX["ce"] * ce


SIDES: dict[str, Loss] = {"fused": _fused, "naive": _naive}


def _inputs(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, nn.Linear, nn.Linear, Tensor]:
    """T + 1 positions, so that T of them have a target."""
    torch.manual_seed(0)
    heads = nn.Linear(D, vocabulary, bias=False), nn.Linear(D, vocabulary, bias=False)
    return (
        torch.randn(1, tokens + 1, D, requires_grad=True),
        torch.randn(1, tokens + 1, D),
        *heads,
        torch.randint(vocabulary, (1, tokens + 1)),
    )


def _measure_once(side: str, queue: Any) -> None:
    """Put (seconds, MiB, sum of the hidden states' gradient) of one call into `queue`. Runs in a fresh process."""
    torch.set_num_threads(THREADS)
    SIDES[side](*_inputs(64, 1024)).backward()  # threads and libraries are up
    inputs = _inputs(T, V)
    forget_peak()
    before, start = mib("VmRSS"), time.perf_counter()
    SIDES[side](*inputs).backward()
    seconds = time.perf_counter() - start
    weight, gradient = inputs[2].weight, inputs[0].grad
    assert gradient is not None
    queue.put((seconds, mib("VmHWM") - before - weight.numel() * weight.element_size() / 2**20, gradient.norm().item()))


def _in_own_process(side: str) -> tuple[float, float, float]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure_once, args=(side, queue))
    process.start()
    found: tuple[float, float, float] = queue.get(timeout=600)
    process.join()
    return found


def measure(repeats: int) -> dict[str, Any]:
    """One row: median seconds and MiB of both sides, and the ratios (fused / naive). Raises ValueError if the gradients differ."""
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side, rows in found.items():
            rows.append(_in_own_process(side))
    row: dict[str, Any] = {"loss": "forward KL + CE", "T": T, "D": D, "V": V, "dtype": "fp32", "repeats": repeats}
    for side, rows in found.items():
        row |= {f"{side}_s": statistics.median(r[0] for r in rows), f"{side}_mib": statistics.median(r[1] for r in rows)}
    norms = {side: rows[0][2] for side, rows in found.items()}
    if abs(norms["fused"] / norms["naive"] - 1) > 1e-4:
        raise ValueError(f"both sides must have the same gradient, got norms {norms}")
    return row | {"time": row["fused_s"] / row["naive_s"], "memory": row["fused_mib"] / row["naive_mib"]}


def main(args: argparse.Namespace) -> None:
    """Print the row; with `--out`, append it to a .jsonl file with what made it."""
    row = measure(args.repeats)
    for what, unit in (("time", "s"), ("memory", "mib")):
        fused, naive = row[f"fused_{unit}"], row[f"naive_{unit}"]
        print(f"{what:<7} fused {fused:7.1f} {unit:<3}   naive {naive:7.1f} {unit:<3}   fused / naive {row[what]:.3f}")
    if args.out:
        append_row(args.out, row)
