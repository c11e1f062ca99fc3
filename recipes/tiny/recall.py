"""What becomes of recall as attention is taken away: teacher, 50%, 25% and 0%, by how many facts there are. `make demo-recall` runs this.

python recipes/tiny/recall.py        (after recipes/tiny/demo.py, whose student it goes on from)

The 50% student is the demo's. The others are converted from it and from each other, and distilled from the teacher for a few steps
more; the last is measured without its recurrence too, as what its windows and sinks recall alone. Two exams: the language's own recall
(one fact of 4 to 64, asked for after another question), and its facts as a needle: one known name among many, at a depth from the start
to the end.
"""

import json
import random
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from demo import CONVERSATIONS, HERE, JOIN_RATE, LENGTH, write_conversations
from demo import recipe as demo
from language import FACT_COUNTS, Message, exam, grade, state_facts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from llamba.base.errors import one_line_errors
from llamba.base.folders import finished
from llamba.eval import scores
from llamba.eval.recall import draw_needle
from llamba.eval.stats import bootstrap
from llamba.models.mixers import without_recurrence
from llamba.running.run import run
from llamba.settings import Distill, Recipe

OUT = Path("runs/demo-recall")
STEPS = {0.25: 160, 0.0: 800}  # by the share of attention that is left: the last layers are the hard ones
TRIALS = 40
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLE_FACTS, NEEDLE_TRIALS = (8, 16, 32, 64), 20

WITHOUT = "0%, recurrence off"

Exam = tuple[list[Message], str]


def further(start: Path, attention: float, output: Path) -> Path:
    """A student with fewer attention layers, distilled a little more; its folder. Continues or skips what is there.

    Everything is trained, on all tokens. Steps of two rows teach more than a quarter as many of eight.
    """
    steps = STEPS[attention]
    stage = Distill(teacher=str(HERE / "teacher"), kl=1.0, ce=0.1, targets="all", train="all", lr=3e-3, join_lr=JOIN_RATE, warmup=40,
                    betas=(0.9, 0.98), clip=1.0, batch=2, micro_batch=2, steps=steps, save_every=steps, log_every=40)  # fmt: skip
    return run(
        Recipe(
            teacher=str(start),
            student=replace(demo.student, attention=attention),
            data=demo.data,
            stages=[stage],
            output=str(output),
            seed=1,
        )
    )


def needle(facts: int, depth: float, rng: random.Random) -> Exam:
    """Facts in turns, then a question about the one at `depth`."""
    turns, known = state_facts(rng, facts)
    names = list(known)
    name = names[round(depth * (facts - 1))]
    messages = [message for turn in turns for message in turn]
    return [*messages, {"role": "user", "content": f"What of\n{name}"}], f"{name} {known[name]}"


@torch.inference_mode()
def right(model, tokenizer, exams: list[Exam]) -> list[float]:
    """100 or 0 for each exam: greedy, exact match."""
    found: list[float] = []
    for start in range(0, len(exams), 20):
        prompts, answers = zip(*exams[start : start + 20], strict=True)
        texts = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, tokenize=False)
        batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)
        out = model.generate(**batch, max_new_tokens=12, do_sample=False)
        replies = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [100.0 * grade(reply, answer) for reply, answer in zip(replies, answers, strict=True)]
    return found


def measure(folder: str, recurrence: bool = True) -> tuple[dict, dict]:
    """Recall by number of facts, and by number and depth."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    stated = {n: [exam("recall", random.Random(f"recall/{n}/{i}"), n) for i in range(TRIALS)] for n in FACT_COUNTS}
    placed = {
        (n, depth): [needle(n, depth, random.Random(f"needle/{n}/{depth}/{i}")) for i in range(NEEDLE_TRIALS)]
        for n in NEEDLE_FACTS
        for depth in DEPTHS
    }
    with nullcontext() if recurrence else without_recurrence(model):
        return (
            {n: right(model, tokenizer, exams) for n, exams in stated.items()},
            {cell: right(model, tokenizer, exams) for cell, exams in placed.items()},
        )


def draw(curves: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Recall against the number of facts, a line per model, with 95% intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (name, found), line in zip(curves.items(), ("-", "--", "-", "-", ":"), strict=True):
        points = [bootstrap({i: [v] for i, v in enumerate(values)}) for values in found.values()]
        spread = [[p.mean - p.low for p in points], [p.high - p.mean for p in points]]
        axes.errorbar(list(found), [p.mean for p in points], yerr=spread, marker="o", linestyle=line, capsize=3, label=name)
    axes.set(xlabel="facts stated before", ylabel="recalled exactly, %", xscale="log", ylim=(-3, 103))
    axes.set_xticks(list(FACT_COUNTS), FACT_COUNTS)
    axes.minorticks_off()
    axes.legend(title="layers with attention")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Make the students, measure all models, draw, print, and write every score."""
    started = time.time()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    done = finished(demo.output)
    if not done:
        raise ValueError(f"{demo.output} must hold the demo's finished run; run `make demo` first")
    write_conversations(Path(str(demo.data.train)), CONVERSATIONS, LENGTH)
    quarter = further(done[-1], 0.25, OUT / "25pct")
    none = further(quarter, 0.0, OUT / "0pct")
    models = {"teacher, 100%": str(HERE / "teacher"), "50%": str(done[-1]), "25%": str(quarter), "0%": str(none), WITHOUT: str(none)}
    curves, needles, rows = {}, {}, []
    print(f"\n{'recalled exactly, %':<22}" + "".join(f"{f'{n} facts':>10}" for n in FACT_COUNTS))
    for name, folder in models.items():
        curves[name], needles[name] = measure(folder, recurrence=name != WITHOUT)
        means = {n: bootstrap({i: [v] for i, v in enumerate(values)}) for n, values in curves[name].items()}
        rows += [scores.score("recall/embedded language", f"{n} facts", name, value) for n, value in means.items()]
        one_by_one = {f"{n} facts/{i}": [value] for n, values in curves[name].items() for i, value in enumerate(values)}
        scores.save_items(OUT, "recall/embedded language", name, None, one_by_one)
        print(f"{name:<22}" + "".join(f"{value.mean:>10.0f}" for value in means.values()), flush=True)
    draw(curves, OUT / "recall.png")
    draw_needle(needles, OUT / "needle.png", "facts")
    (OUT / scores.MODELS).write_text(json.dumps({n: {"path": f, "attention": scores.attention_of(f)} for n, f in models.items()}, indent=1))
    scores.save(OUT, rows)
    pictures = f"{OUT}/recall.png (by facts), {OUT}/needle.png (by facts and depth)"
    print(f"\npictures: {pictures}; {time.time() - started:.0f} s; `llamba report {OUT}`")


if __name__ == "__main__":
    with one_line_errors():
        main()
