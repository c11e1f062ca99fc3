"""Which mixer should stand where attention stood: every kind on the embedded teacher, at equal tokens, with 50, 25 and 0% attention.

python recipes/tiny/mixers.py [--steps 24] [--seeds 3] [--only NAME ...] [--attention 0.5 0.25 0] [--processes 2]

Protocol: every arm distils from attention's weights by KL on all tokens, for the same number of steps of BATCH x LENGTH tokens. Its
learning rate is the one of RATES whose run with TUNING_SEED at a quarter of attention has the lowest held-out KL; then it runs with other
seeds. What a recurrence counts beside a window has the demo's rate, JOIN_RATE. Held-out conversations have HELD_LENGTH tokens. A mixer
that sees beyond its state is measured with the recurrence off too. Runs are kept in --out, and the same command goes on with what is
missing; at the end table.md and kl.png stand there.
Shapes: B conversations of T tokens, V vocabulary.
"""

import argparse
import json
import math
import multiprocessing
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from demo import HERE, JOIN_RATE, LATE, held_out, mean, score, write_conversations
from language import exam, grade
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from llamba.base.provenance import append_row
from llamba.eval.lengths import cache_bytes
from llamba.models.mixers import without_recurrence
from llamba.running.run import run
from llamba.settings import Data, Distill, Recipe, Student
from llamba.training.metrics import METRICS, read_metrics

NEAR: dict[str, Any] = {"window": 16, "sinks": 4}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", {}),
    "mamba2 + rotary": ("mamba2", {"rotary": True}),
    "mamba2 + sinks": ("mamba2", {"sinks": 4}),
    "mamba2 + window, sinks": ("mamba2", NEAR),
    "mamba2 + window, sinks, rotary": ("mamba2", {**NEAR, "rotary": True}),
    "gated_delta": ("gated_delta", {}),
    "gated_delta + window, sinks, rotary": ("gated_delta", {**NEAR, "rotary": True}),
    "kda": ("kda", {}),
    "mamba3": ("mamba3", {}),
    "mamba1": ("mamba1", {}),
    "discrete_mamba2": ("discrete_mamba2", {}),
}
ALONE = "window, sinks alone, untrained"  # the arm with window and sinks, converted, its recurrence off
FRACTIONS = (0.5, 0.25, 0.0)
RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED, TUNING_FRACTION = 100, 0.25
BATCH, LENGTH, HELD, HELD_LENGTH = 4, 256, 8, 512
FACTS, EXAMS = (8, 16, 32), 20
RESULTS = HERE.parent.parent / "eval" / "results" / "mixers_embedded.jsonl"

Run = tuple[str, float, float, int]  # arm, share of attention, learning rate, seed


def _folder(out: Path, one: Run) -> Path:
    name, attention, lr, seed = one
    return out / f"{name.replace(', ', '_').replace(' ', '_')}-{attention:g}-{lr:g}-{seed}"


@torch.inference_mode()
def _recall(model: Any, tokenizer: Any, facts: int) -> float:
    """Share of exact answers about one of so many facts, stated before another question."""
    prompts, answers = zip(*(exam("recall", random.Random(f"recall/{facts}/{i}"), facts) for i in range(EXAMS)), strict=True)
    texts = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, tokenize=False)
    batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=12, do_sample=False)
    replies = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(map(grade, replies, answers)) / EXAMS


@torch.inference_mode()
def _kl(model: Any, teacher: Any, tokens: torch.Tensor) -> tuple[float, float]:
    """KL(teacher || model) over all tokens and over those behind LATE, nats per token."""
    own, theirs = (m(tokens, use_cache=False).logits.float().log_softmax(-1) for m in (model, teacher))  # [B, T, V]
    kl = (theirs.exp() * (theirs - own)).sum(-1)
    return kl.mean().item(), kl[:, LATE:].mean().item()


def measure(folder: str | Path, recurrence: bool, brief: bool) -> dict[str, float]:
    """A model's distance to the teacher, exact answers and recall; `brief`: the distance alone."""
    teacher, model = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (HERE / "teacher", folder))
    tokenizer = AutoTokenizer.from_pretrained(HERE / "teacher")
    tokenizer.padding_side = "left"
    with nullcontext() if recurrence else without_recurrence(model):
        kl, late = _kl(model, teacher, held_out(tokenizer, HELD, HELD_LENGTH))
        if brief:
            return {"kl": kl, "late": late}
        recalled = {f"recall {facts}": _recall(model, tokenizer, facts) for facts in FACTS}
        return {"kl": kl, "late": late, "exact": mean(score(model, tokenizer, per_skill=10)), **recalled}


@torch.inference_mode()
def _costs(folder: Path) -> dict[str, float]:
    """Bytes of the cache behind HELD_LENGTH tokens, and tokens per second of greedy decoding, batch 1."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = model(torch.zeros(1, HELD_LENGTH, dtype=torch.long), use_cache=True, logits_to_keep=1)
    cache, token = out.past_key_values, torch.zeros(1, 1, dtype=torch.long)
    size, start = cache_bytes(cache), time.perf_counter()
    for _ in range(64):
        model(token, past_key_values=cache, use_cache=True)
    return {"bytes": size, "decode": 64 / (time.perf_counter() - start)}


def do(one: Run, steps: int, out: Path) -> None:
    """One run and its scores, unless they are there."""
    name, attention, lr, seed = one
    folder = _folder(out, one)
    if (folder / "scores.json").exists():
        return
    kind, options = ARMS[name]
    stage = Distill(kl=1.0, ce=0.0, targets="all", lr=lr, join_lr=JOIN_RATE, betas=(0.9, 0.98), clip=1.0, warmup=6, batch=BATCH,
                    micro_batch=BATCH, steps=steps, save_every=10**6, log_every=4, precision="fp32")  # fmt: skip
    student = Student(mixer=kind, attention=attention, options=options)
    data = Data(train=str(out / "train.jsonl"), length=LENGTH)
    last = run(Recipe(teacher=str(HERE / "teacher"), student=student, data=data, stages=[stage], output=str(folder), seed=seed))
    brief = seed == TUNING_SEED
    result = {"on": measure(last, True, brief)}
    if options.get("window") or options.get("sinks"):
        result["off"] = measure(last, False, brief)
        result["start"] = measure(folder / "0-convert", False, brief or seed > 0)
    result["costs"] = {} if brief else _costs(last)
    result["costs"]["train"] = statistics.median(line["tokens_per_s"] for line in read_metrics(last / METRICS)[1:])
    for step in folder.glob("*-*/model.safetensors"):
        step.unlink()
    (folder / "scores.json").write_text(json.dumps(result) + "\n")
    if not brief:
        row = {"measured": "mixers", "arm": name, "attention": attention, "lr": lr, "seed": seed, "tokens": steps * BATCH * LENGTH}
        append_row(RESULTS, row | result)


def read(out: Path, one: Run) -> dict[str, dict[str, float]]:
    """A run's scores."""
    found: dict[str, dict[str, float]] = json.loads((_folder(out, one) / "scores.json").read_text())
    return found


def best_rate(out: Path, name: str) -> float:
    """The arm's learning rate."""
    return min(RATES, key=lambda lr: read(out, (name, TUNING_FRACTION, lr, TUNING_SEED))["on"]["kl"])


def _cell(values: list[float], scale: float = 1.0, digits: int = 3) -> str:
    error = f" ± {scale * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{error}"


def _row(name: str, lr: str, found: list[dict[str, dict[str, float]]], which: str) -> str:
    shares = ("exact", *(f"recall {n}" for n in FACTS))
    values = {key: [one[which][key] for one in found if key in one[which]] for key in ("kl", "late", *shares)}
    cells = [_cell(values["kl"]), _cell(values["late"]), *(_cell(values[key], 100, 0) for key in shares)]
    costs = ["", "", ""]
    if which == "on":
        means = {key: statistics.mean(one["costs"][key] for one in found) for key in ("bytes", "decode", "train")}
        costs = [f"{means['bytes'] / 1024:.0f}", f"{means['decode']:.0f}", f"{means['train']:.0f}"]
    return "| " + " | ".join([name, lr, *cells, *costs]) + " |"


def report(out: Path, names: list[str], fractions: list[float], seeds: int) -> str:
    """A table per share of attention, in Markdown."""
    head = [
        "mixer",
        "rate",
        "KL",
        f"KL behind {LATE}",
        "exact",
        *(f"{n} facts" for n in FACTS),
        "cache, KiB",
        "decode, tok/s",
        "train, tok/s",
    ]
    lines = []
    for attention in fractions:
        lines += [f"{attention:.0%} attention", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name in names:
            lr = best_rate(out, name)
            found = [read(out, (name, attention, lr, seed)) for seed in range(seeds)]
            lines.append(_row(name, f"{lr:g}", found, "on"))
            if "off" in found[0]:
                lines.append(_row(f"{name}; recurrence off", "", found, "off"))
            if name == "mamba2 + window, sinks":
                lines.append(_row(ALONE, "", found[:1], "start"))
        lines.append("")
    return "\n".join(lines)


def draw(out: Path, names: list[str], fractions: list[float], path: Path) -> None:
    """KL in training against tokens, a line per arm, a panel per share of attention."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(fractions) + 2, 4), layout="constrained")
    panels = figure.subplots(1, len(fractions), sharey=True, squeeze=False)[0]
    colours = colormaps["tab20"](range(len(names)))
    for axes, attention in zip(panels, fractions, strict=True):
        for name, colour in zip(names, colours, strict=True):
            folder = _folder(out, (name, attention, best_rate(out, name), 0))
            lines = [line for line in read_metrics(folder / "1-distill" / METRICS) if "kl" in line]
            style = "-" if "window" in name else ":"
            axes.plot([line["tokens"] for line in lines], [line["kl"] for line in lines], style, color=colour, label=name)
        axes.set(title=f"{attention:.0%} attention", xlabel="tokens", yscale="log")
    panels[0].set_ylabel("KL to the teacher, nats per token")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize="small", loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


def _alone() -> None:
    """What a process of the pool is told before its first run."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _all(pool: ProcessPoolExecutor, runs: list[Run], steps: int, out: Path) -> None:
    """Do the runs, and say each one's distance."""
    done = {pool.submit(do, one, steps, out): one for one in runs}
    for future in as_completed(done):
        future.result()
        name, attention, lr, seed = done[future]
        print(f"{name}, {attention:.0%}, lr {lr:g}, seed {seed}: KL {read(out, done[future])['on']['kl']:.3f}", flush=True)


def main() -> None:
    """Do what is missing, each run in a process of its own, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mixers"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(ARMS), choices=list(ARMS), metavar="NAME")
    parser.add_argument("--attention", nargs="*", type=float, default=list(FRACTIONS))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    write_conversations(args.out / "train.jsonl", args.steps * BATCH, LENGTH)
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), _alone) as pool:
        _all(pool, [(name, TUNING_FRACTION, lr, TUNING_SEED) for name in args.only for lr in RATES], args.steps, args.out)
        runs = [(name, share, best_rate(args.out, name)) for share in args.attention for name in args.only]
        _all(pool, [(*one, seed) for seed in range(args.seeds) for one in runs], args.steps, args.out)
    table = report(args.out, args.only, args.attention, args.seeds)
    (args.out / "table.md").write_text(table)
    draw(args.out, args.only, args.attention, args.out / "kl.png")
    print(table)


if __name__ == "__main__":
    main()
