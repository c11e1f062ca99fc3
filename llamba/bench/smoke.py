"""Does it run at all: every Triton kernel, forward and backward, against PyTorch, and one captured graph; one row each.

On a CPU the kernels are interpreted (TRITON_INTERPRET=1), in fp32 alone and smaller. The checks are in `smoke_cases`.
"""

import argparse
import time
import traceback
from typing import Any

import torch

from llamba.base.devices import meant
from llamba.base.provenance import append_row
from llamba.bench.smoke_cases import Case, cases

BUDGET = {torch.float32: 1e-3, torch.bfloat16: 1e-2}  # relative RMS error; products of fp32 may be tf32's


def check(name: str, case: Case, budget: float) -> dict[str, Any]:
    """One row: the worst error, or the whole of what was raised. Whatever a kernel raises is a result here, not an end."""
    started = time.perf_counter()
    row: dict[str, Any] = {"bench": "smoke", "case": name, "error": None}
    try:
        found = case()
        worst = max(found, key=lambda key: found[key] if found[key] == found[key] else float("inf"))
        row |= {"worst": worst, "relative": found[worst], "passed": found[worst] <= budget}
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, KeyError, IndexError, OSError):
        row |= {"passed": False, "error": traceback.format_exc()}
    return row | {"seconds": round(time.perf_counter() - started, 2)}


def main(args: argparse.Namespace) -> None:
    """Print the table; with `--out`, append the rows. Exits with 1 where a case failed."""
    device = meant(args.device)
    failed = 0
    for dtype, budget in BUDGET.items():
        if device == "cpu" and dtype != torch.float32:
            continue  # the interpreter multiplies bit patterns of bf16
        for name, case in cases(dtype, device).items():
            row = check(name, case, budget) | {"dtype": str(dtype).removeprefix("torch."), "device": device}
            failed += not row["passed"]
            said = row["error"].strip().splitlines()[-1] if row["error"] else f"{row['worst']} off by {row['relative']:.1e}"
            print(f"{name:<28}{row['dtype']:<10}{'ok' if row['passed'] else 'FAILED':<8}{row['seconds']:6.1f} s   {said}", flush=True)
            if args.out:
                append_row(args.out, row)
    if failed:
        raise SystemExit(1)
