"""`llamba bench cold`: a new process that loads a model and answers one token: the command, the API, a bare transformers script.

Counted are the CPU-seconds of the whole process, imports and all, as the system tells them of children (user and system time). A first
run of each is not counted: it leaves compiled modules and files in memory, as any use does.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
from typing import Any

TEXT = "The capital of France is"
BARE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = tokenizer(sys.argv[2], return_tensors="pt")
with torch.inference_mode():
    new = model.generate(**ids, max_new_tokens=1, do_sample=False)
print(tokenizer.decode(new[0, -1]))
"""
API = """
import sys
import torch
import llamba
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = tokenizer(sys.argv[2], return_tensors="pt")["input_ids"]
print(tokenizer.decode(llamba.generate(model, ids, max_new_tokens=1).new[0][-1]))
"""


def processes(model: str) -> dict[str, list[str]]:
    """Command lines that print the same token, by name; the bare script first."""
    command = ["-m", "llamba", "generate", model, TEXT, "--max-new-tokens", "1", "--device", "cpu"]
    made = {"transformers": ["-c", BARE, model, TEXT], "llamba generate": command, "llamba.generate": ["-c", API, model, TEXT]}
    return {name: [sys.executable, *arguments] for name, arguments in made.items()}


def cpu_seconds(command: list[str], threads: int) -> tuple[float, str]:
    """User and system time of a process and its children, and what it printed. Raises ValueError with its last words where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), HF_HUB_DISABLE_PROGRESS_BARS="1")
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise ValueError(f"{command[1:3]} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout.strip()


def main(args: argparse.Namespace) -> None:
    """Print the CPU-seconds of each, in turns, their medians, and ours over transformers'; with `--out`, append a row."""
    from llamba.base.provenance import append_row
    from llamba.models.loading import located

    model = located(args.model)
    spent: dict[str, list[float]] = {}
    printed: dict[str, str] = {}
    for turn in range(args.repeats + 1):
        for name, command in processes(model).items():
            seconds, printed[name] = cpu_seconds(command, args.threads)
            spent.setdefault(name, []).extend([seconds] if turn else [])
    bare = statistics.median(spent["transformers"])
    row: dict[str, Any] = {"bench": "cold", "model": args.model, "threads": args.threads, "repeats": args.repeats}
    for name, runs in spent.items():
        median = statistics.median(runs)
        row[name] = {"cpu_s": median, "of_transformers": median / bare, "runs": runs, "printed": printed[name]}
        print(f"{name:16} {median:6.2f} CPU-s  {median / bare:5.2f} of transformers'  (runs {', '.join(f'{one:.2f}' for one in runs)})")
    if args.out:
        append_row(args.out, row)
