"""What becomes of recall as attention is taken away: teacher, 50%, 25% and 0%, by how many facts there are and how far away.

`make demo-recall` runs this.

python recipes/tiny/recall.py        (after recipes/tiny/demo.py, whose student it goes on from)

The 50% student is the demo's. The others are converted from it and from each other, and distilled from the teacher for a few steps
more; the last is measured without its recurrence too, as what its windows and sinks recall alone. Three exams: the language's own
recall (one fact of 4 to 64, asked for after another question), the same of 4 facts behind 1 to 16 other questions, and facts as a
needle: one known name among many, at a depth from the start to the end.
"""

import json
import random
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

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
STEPS = {0.25: 80, 0.0: 880}  # by the share of attention that is left: the last layers are the hard ones
TRIALS = 40
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLE_FACTS, NEEDLE_TRIALS = (8, 16, 32, 64), 20
FEW, BETWEEN = 4, (1, 2, 4, 8, 16)  # facts, and how many questions stand between them and the one about them

WITHOUT = "0%, recurrence off"
BENCHMARK = "recall/embedded language"

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
def right(model, tokenizer, asked: list[Exam]) -> list[float]:
    """100 or 0 for each exam: greedy, exact match."""
    found: list[float] = []
    for start in range(0, len(asked), 20):
        prompts, answers = zip(*asked[start : start + 20], strict=True)
        texts = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, tokenize=False)
        batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)
        out = model.generate(**batch, max_new_tokens=12, do_sample=False)
        replies = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [100.0 * grade(reply, answer) for reply, answer in zip(replies, answers, strict=True)]
    return found


def exams() -> dict[str, dict[Any, list[Exam]]]:
    """By kind: recall by number of facts, by questions between, and by number of facts and depth."""
    return {
        "facts": {n: [exam("recall", random.Random(f"recall/{n}/{i}"), n) for i in range(TRIALS)] for n in FACT_COUNTS},
        "apart": {n: [exam("recall", random.Random(f"apart/{n}/{i}"), FEW, n) for i in range(TRIALS)] for n in BETWEEN},
        "needle": {
            (n, depth): [needle(n, depth, random.Random(f"needle/{n}/{depth}/{i}")) for i in range(NEEDLE_TRIALS)]
            for n in NEEDLE_FACTS
            for depth in DEPTHS
        },
    }


def measure(folder: str, asked: dict[str, dict[Any, list[Exam]]], recurrence: bool = True) -> dict[str, dict[Any, list[float]]]:
    """A model's answers to exams, right (100) or wrong (0)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    with nullcontext() if recurrence else without_recurrence(model):
        return {kind: {cell: right(model, tokenizer, some) for cell, some in cells.items()} for kind, cells in asked.items()}


def tokens_between(some: list[Exam]) -> int:
    """How many tokens stand between the few facts and the question about them: a mean over exams."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "teacher")
    texts = [tokenizer.apply_chat_template(messages[2:-1], tokenize=False) for messages, _ in some]
    return round(sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) / len(texts))


def draw(curves: dict[str, dict[int, list[float]]], label: str, path: Path) -> None:
    """Recall against a number, a line per model, with 95% intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (name, found), line in zip(curves.items(), ("-", "--", "-", "-", ":"), strict=True):
        points = [bootstrap({i: [v] for i, v in enumerate(values)}) for values in found.values()]
        spread = [[p.mean - p.low for p in points], [p.high - p.mean for p in points]]
        axes.errorbar(list(found), [p.mean for p in points], yerr=spread, marker="o", linestyle=line, capsize=3, label=name)
    axes.set(xlabel=label, ylabel="recalled exactly, %", ylim=(-3, 103))
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(found), list(map(str, found)))
    axes.legend(title="layers with attention")
    figure.savefig(path, dpi=110)


def noted(name: str, found: dict[str, dict[Any, list[float]]], distances: dict[int, int]) -> list[dict[str, Any]]:
    """A model's scores; those of each question go to the folder."""
    cells = {f"{n} facts": values for n, values in found["facts"].items()}
    cells |= {f"{FEW} facts, {distances[n]} tokens between": values for n, values in found["apart"].items()}
    one_by_one = {f"{cell}/{i}": [value] for cell, values in cells.items() for i, value in enumerate(values)}
    scores.save_items(OUT, BENCHMARK, name, None, one_by_one)
    means = {cell: bootstrap({i: [v] for i, v in enumerate(values)}) for cell, values in cells.items()}
    return [scores.score(BENCHMARK, cell, name, value) for cell, value in means.items()]


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
    asked = exams()
    distances = {n: tokens_between(some) for n, some in asked["apart"].items()}
    found, rows = {}, []
    heads = [f"{n} facts" for n in FACT_COUNTS] + [f"{tokens} apart" for tokens in distances.values()]
    print(f"\n{'recalled exactly, %':<22}" + "".join(f"{head:>10}" for head in heads))
    for name, folder in models.items():
        found[name] = measure(folder, asked, recurrence=name != WITHOUT)
        rows += (made := noted(name, found[name], distances))
        print(f"{name:<22}" + "".join(f"{row['value']:>10.0f}" for row in made), flush=True)
    draw({name: kinds["facts"] for name, kinds in found.items()}, "facts stated before", OUT / "recall.png")
    apart = {name: {distances[n]: values for n, values in kinds["apart"].items()} for name, kinds in found.items()}
    draw(apart, f"tokens between {FEW} facts and the question", OUT / "distance.png")
    draw_needle({name: kinds["needle"] for name, kinds in found.items()}, OUT / "needle.png", "facts")
    (OUT / scores.MODELS).write_text(json.dumps({n: {"path": f, "attention": scores.attention_of(f)} for n, f in models.items()}, indent=1))
    scores.save(OUT, rows)
    pictures = f"{OUT}/recall.png (by facts), {OUT}/distance.png, {OUT}/needle.png (by facts and depth)"
    print(f"\npictures: {pictures}; {time.time() - started:.0f} s; `llamba report {OUT}`")


if __name__ == "__main__":
    with one_line_errors():
        main()
