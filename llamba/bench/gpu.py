"""`make gpu`: what only a GPU can say of this project, in the order of its value. Each part is a process with a time limit of its own.

Rows go to one file as they are made, each with its part, commit, versions, device and clocks; a part that fails leaves its whole error
and takes no other with it. Parts that have passed at this commit are skipped, so the same command goes on after an interruption.
`dry` passes through every part on a CPU: kernels interpreted, shapes shrunken, rows marked as dry.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamba.base.provenance import append_row, commit

LLAMBA = (sys.executable, "-m", "llamba")
SHRINK, SHRUNK = "32", "64"  # of a dry run: bench shapes, and those whose vocabulary weighs most


@dataclass(frozen=True)
class Part:
    """A part of the run: what it says, its command on a GPU and on a CPU, and the seconds it may take there and here.

    `rows`: whether the command takes `--out` and writes rows of its own.
    """

    about: str
    command: tuple[str, ...]
    dry: tuple[str, ...]
    seconds: int
    dry_seconds: int
    rows: bool = True


def _bench(name: str, *more: str) -> tuple[str, ...]:
    return (*LLAMBA, "bench", name, *more)


PARTS: dict[str, Part] = {
    "smoke": Part("every kernel against PyTorch, one graph captured", _bench("smoke"), _bench("smoke", "--device", "cpu"), 75, 60),
    "decode": Part(
        "8B at 50%, batch 1: bandwidth, Hugging Face, verifying 5 tokens", _bench("decode", "--repeats", "3"),
        _bench("decode", "--repeats", "1", "--device", "cpu", "--shrink", SHRUNK, "--tokens", "4"), 80, 60,
    ),
    "speculative": Part(
        "speculation at a set acceptance", _bench("speculative", "--preset", "goal-llama3-50-2", "--lookahead", "4", "--repeats", "2"),
        _bench("speculative", "--preset", "goal-llama3-50-2", "--lookahead", "2", "--repeats", "1", "--device", "cpu", "--shrink", SHRUNK,
               "--tokens", "6"), 60, 60,
    ),
    "train": Part(
        "an SSD training step against PyTorch and other packages", _bench("train", "--repeats", "5"),
        _bench("train", "--repeats", "1", "--device", "cpu", "--shrink", SHRINK), 45, 30,
    ),
    "mfu": Part(
        "a distillation step of an 8B-shaped student", _bench("mfu", "--repeats", "3"),
        _bench("mfu", "--repeats", "1", "--device", "cpu", "--shrink", SHRUNK), 60, 60,
    ),
    "tests": Part(
        "the rest of what the tests ask of a GPU", (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"),
        (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"), 120, 30, rows=False,
    ),
}  # fmt: skip
TEACHER = Part(
    "a chat model distilled for the time that is left", _bench("teacher"),
    _bench("teacher", "--device", "cpu", "--shrink", "9", "--minutes", "0.1"), 600, 60,
)  # fmt: skip
ENDING = 20  # seconds of the last part that are left for its last row


def clocks() -> str | None:
    """Clocks, power and temperature as the driver tells them; None without its tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = "--query-gpu=name,clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    return subprocess.run([tool, asked, "--format=csv,noheader"], capture_output=True, text=True).stdout.strip() or None


def passed(out: Path, dry: bool) -> set[str]:
    """Parts that have passed at this commit. A line that a killed process left unfinished counts for nothing."""
    found, here = set(), commit()
    for line in out.read_text().split("\n")[:-1] if out.exists() else []:
        row = json.loads(line)
        if row.get("bench") == "part" and row["status"] == "passed" and row["commit"] == here and row["dry"] == dry:
            found.add(row["part"])
    return found


def _mended(out: Path) -> None:
    """Cut off a last line that was not finished."""
    if out.exists() and (text := out.read_text()) and not text.endswith("\n"):
        out.write_text(text[: text.rfind("\n") + 1])


def _run(command: Sequence[str], seconds: float, dry: bool) -> tuple[str, str]:
    """How a command ended ("passed", "failed" or "out of time") and all that it printed. Its whole process group ends with it."""
    environment = os.environ | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else {})
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            status = "passed" if process.wait(seconds) in (0, 5 if "pytest" in command else 0) else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return status, log.read()


def run_part(name: str, part: Part, out: Path, dry: bool, left: float) -> dict[str, Any]:
    """Run a part within `left` seconds at most, keep its rows, and return the row that says how it ended."""
    command, limit = (part.dry, part.dry_seconds) if dry else (part.command, part.seconds)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        status, printed = _run([*command, *(("--out", str(rows)) if part.rows else ())], min(limit, left), dry)
        about = {"part": name, "dry": dry, "clocks": clocks()}
        with out.open("a") as file:
            for line in rows.read_text().splitlines() if rows.exists() else []:
                file.write(json.dumps(json.loads(line) | about) + "\n")
    ended = {"bench": "part", "status": status, "seconds": round(time.monotonic() - started, 1), "ran": list(command)}
    append_row(out, ended | about | {"printed": printed if status != "passed" else printed[-2000:]})
    return ended | {"printed": printed}


def parts(dry: bool, minutes: float, packed: Sequence[str] | None) -> dict[str, Part]:
    """The parts of a run: with `packed` folders the teacher alone, for all of the time; without, all others, and in a dry run it too."""
    if packed and not dry:
        asked = ("--pack", *packed, "--minutes", f"{minutes - ENDING / 60:.3g}")
        return {"teacher": replace(TEACHER, command=(*TEACHER.command, *asked), seconds=int(60 * minutes))}
    return PARTS | ({"teacher": TEACHER} if dry else {})


def run(out: Path, dry: bool, minutes: float, packed: Sequence[str] | None = None) -> bool:
    """All parts that have not passed yet, in order; whether all passed."""
    _mended(out)
    done, ends, good = passed(out, dry), time.monotonic() + 60 * minutes, True
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, part in parts(dry, minutes, packed).items():
        if name in done:
            print(f"{name:<14}passed before at this commit")
            continue
        left = ends - time.monotonic()
        if left < 5:
            print(f"{name:<14}not begun: the {minutes:g} minutes are over")
            good = False
            continue
        print(f"{name:<14}{part.about} ...", flush=True)
        ended = run_part(name, part, out, dry, left)
        good &= ended["status"] == "passed"
        print(f"{name:<14}{ended['status']} in {ended['seconds']} s\n{_shown(ended['printed'])}", flush=True)
    print(f"rows: {out}")
    return good


def _shown(printed: str) -> str:
    return "\n".join(f"    {line}" for line in printed.strip().splitlines()[-16:])


def main(args: argparse.Namespace) -> None:
    """Run the parts; exits with 1 where one did not pass. Raises ValueError without a GPU, unless the run is dry."""
    if not args.dry:
        import torch

        if not torch.cuda.is_available():
            raise ValueError("bench gpu needs a CUDA device; torch sees none here; --dry passes through every part on the CPU")
    if not run(Path(args.out or "eval/results/gpu.jsonl"), args.dry, args.minutes, args.pack):
        raise SystemExit(1)
