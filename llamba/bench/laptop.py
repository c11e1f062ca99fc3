"""`llamba bench laptop`: what converting a small model on a CPU costs, each work in its own process, beside another checkout's code.

Works: `distill` and `hidden`, whole optimizer steps of 2 x 512 tokens with mixers trained, as the stages run them; `select`, layers ranked
by exchanging one at a time; `decode`, one sequence of 64 new tokens, against Hugging Face's loop on the same model in the same process.
Seconds are those of the processor, over all threads, so that what else the machine does counts little; those of the clock stand beside.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTH, ROWS, NEW = 512, 2, 64  # tokens of a sequence, sequences of a step, new tokens

Marks = list[tuple[float, float]]  # seconds of the clock and of the processor


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Whole optimizer steps of a stage: median seconds, the fastest step's rate, the first loss and the peak of memory."""
    from llamba.data.tokens import StageData
    from llamba.settings import Distill, Hidden
    from llamba.stages import distill, hidden
    from llamba.training.trainer import DistillTrainer

    marks: Marks = []
    own = DistillTrainer.training_step

    def marked(*args: Any, **kwargs: Any) -> Any:
        marks.append(_now())
        return own(*args, **kwargs)

    DistillTrainer.training_step = marked  # type: ignore[method-assign]
    common: dict[str, Any] = dict(
        batch=ROWS, micro_batch=ROWS, steps=task["steps"] + 2, lr=1e-4, warmup=0, log_every=1, save_every=10**6, schedule="constant"
    )
    with tempfile.TemporaryDirectory() as folder:
        data = StageData(None, 0, Path(task["rows"]))  # type: ignore[arg-type]
        if task["work"] == "distill":
            metrics = distill.run(Distill(kl=1.0, ce=0.0, **common), task["student"], task["model"], data, Path(folder))
        else:
            metrics = hidden.run(Hidden(targets="assistant", **common), task["student"], task["model"], data, Path(folder))
    steps = list(zip(marks[1:], marks[2:], strict=False))
    wall, busy = (statistics.median(after[kind] - before[kind] for before, after in steps) for kind in (0, 1))
    return {"step_s": wall, "step_cpu_s": busy, "tokens": ROWS * LENGTH, "cpu_tokens_per_s": ROWS * LENGTH / busy, "loss": metrics["loss"]}


def select(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds to rank the layers on so many sequences, conversion and loading aside."""
    from llamba.settings import Select
    from llamba.stages import select as stage

    own, marks = stage._choose, Marks()

    def marked(*args: Any, **kwargs: Any) -> Any:
        marks.append(_now())
        made = own(*args, **kwargs)
        marks.append(_now())
        return made

    stage._choose = marked
    from llamba.data.tokens import Data

    with tempfile.TemporaryDirectory() as folder:
        data = Data(train=task["data"], length=LENGTH, template=task["template"])
        out = Path(folder) / "layers.json"
        stage.select(task["model"], None, data, Select(keep=0.5, method="swap", rows=task["sequences"]), out, "mamba2")
        found = json.loads(out.read_text())
    return {"s": marks[1][0] - marks[0][0], "cpu_s": marks[1][1] - marks[0][1], "layers": found["layers"], "scores": found["scores"]}


def _rate(run: Callable[[int], Any], repeats: int) -> dict[str, float]:
    """Tokens per second of the processor and of the clock behind the prompt and the first token; the best of the repeats."""
    run(2)
    cpu, clock = [], []
    for _ in range(repeats):
        spent = []
        for new in (NEW + 1, 1):
            before = _now()
            run(new)
            spent.append([after - start for after, start in zip(_now(), before, strict=True)])
        clock.append(NEW / (spent[0][0] - spent[1][0]))
        cpu.append(NEW / (spent[0][1] - spent[1][1]))
    return {"tokens_per_s": max(clock), "cpu_tokens_per_s": max(cpu)}


def decode(task: dict[str, Any]) -> dict[str, Any]:
    """Rates of Hugging Face's loop and of ours, of teacher and student, in bf16; and in 8 bits, where the build has them."""
    import torch
    from transformers import AutoModelForCausalLM

    from llamba import speculative

    found: dict[str, Any] = {}
    for name in ("model", "student"):
        model: Any = AutoModelForCausalLM.from_pretrained(task[name], dtype=torch.bfloat16).eval()
        ids = torch.randint(3, model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))

        def theirs(new: int, model: Any = model, ids: Any = ids) -> None:
            given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
            model.generate(ids, **given, pad_token_id=0)

        def ours(new: int, model: Any = model, ids: Any = ids) -> None:
            speculative.generate(model, ids, max_new_tokens=new, eos_token_id=None)

        found[name] = {"hugging_face": _rate(theirs, task["repeats"]), "llamba": _rate(ours, task["repeats"])}
        if (Path(speculative.__file__).parent / "packed.py").exists():
            from llamba.speculative.packed import to_int8

            to_int8(model)
            found[name]["llamba_int8"] = _rate(ours, task["repeats"])
    return found


def work(task: dict[str, Any]) -> None:
    """One work, in this process; prints its numbers as the last line."""
    import torch

    torch.set_num_threads(task["threads"])
    made = {"select": select, "decode": decode}.get(task["work"], train)(task)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"work": task["work"], **made, "peak_mib": peak}), flush=True)


def _in_process(task: dict[str, Any], checkout: Path | None) -> dict[str, Any]:
    """A work in a new process, with this package or that of another checkout. Raises ValueError with its last words where it fails."""
    env = dict(os.environ, PYTHONSAFEPATH="1", OMP_NUM_THREADS=str(task["threads"]))
    if checkout is not None:
        env["PYTHONPATH"] = str(checkout)
    done = subprocess.run([sys.executable, __file__, json.dumps(task)], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{task['work']} failed with {checkout or 'this package'}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def _prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The packed rows and, where none is named, the student with mixers in half of the layers; what every work is told."""
    from llamba.data.tokens import tokenize
    from llamba.models.convert import convert
    from llamba.models.loading import load_tokenizer, located
    from llamba.settings import Data

    model = located(args.model)
    tokenize(
        Data(train=args.data, length=LENGTH, packing=True, template=args.template), load_tokenizer(model), "assistant", folder / "rows"
    )
    if args.student is None:
        convert(model, mixer="mamba2", attention=0.5).save_pretrained(folder / "student")
    student = args.student or str(folder / "student")
    return {
        "model": model, "student": student, "rows": str(folder / "rows"), "data": args.data, "template": args.template,
        "steps": args.steps, "repeats": args.repeats, "threads": args.threads, "sequences": args.sequences,
    }  # fmt: skip


def _said(name: str, row: dict[str, Any]) -> str:
    if row["work"] == "decode":
        rates = (f"{model}: " + ", ".join(f"{who} {one['cpu_tokens_per_s']:.1f}" for who, one in row[model].items())
                 for model in ("model", "student"))  # fmt: skip
        return f"{name:8} {row['work']:8} tokens per CPU-second  " + "; ".join(rates)
    seconds = row.get("cpu_s") or row["step_cpu_s"]
    return f"{name:8} {row['work']:8} {seconds:8.2f} CPU-s  {row.get('s') or row['step_s']:8.2f} s  peak {row['peak_mib']:,.0f} MiB"


def main(args: argparse.Namespace) -> None:
    """Print every work's numbers, ours and the other checkout's in turn; with `--out`, append the rows with what made them."""
    from llamba.base.provenance import append_row

    with tempfile.TemporaryDirectory() as folder:
        told = _prepare(args, Path(folder))
        for one in args.work:
            sides = {"this": None} | ({"other": Path(args.against).resolve()} if args.against else {})
            for name, checkout in sides.items():
                row = _in_process(told | {"work": one}, checkout)
                print(_said(name, row), flush=True)
                if args.out:
                    append_row(args.out, {"bench": "laptop", "build": args.against if checkout else "this", "threads": args.threads, **row})


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
