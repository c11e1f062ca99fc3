"""A real chat model on this machine, without a hub: SmolLM2-135M-Instruct from a package, converted, distilled and measured.

    python recipes/real/real.py [minutes=15] [data=FILE or ORG/SET:SPLIT] [output=runs/real]        (`make real` runs this)

Two students: in `runs/real` half of the layers keep attention, in `runs/real-0pct` none does. The first keeps it where a window misses it
most (`select`); its other layers are converted and fitted to attention, and it is distilled by KL. The second goes on from it: the rest of
its layers are converted and fitted, and it is distilled from the teacher in turn. Only what is new in the mixers learns, so that both
answer as the teacher does for as long as all of a chat is in sight of the window. `minutes` is what fits and training may take, both
students together, on two idle cores; with more of them the runs that are there go on. Chats are the chitchat package's (MIT licence), some
with answers by the teacher, or rows of `messages` that `data` names; every twentieth row is held out. Everything that is finished is kept:
after an interruption the same command goes on.
"""

import copy
import io
import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llamba import Data, Distill, Draft, PseudoLabel, Recipe, Select, Student, convert, run
from llamba.base.errors import one_line_errors
from llamba.base.progress import quiet_libraries
from llamba.chat.conversation import Chat, Sampling, load, load_draft
from llamba.models.mixers import without_recurrence
from llamba.recipes.real.chats import CHITCHAT, held_out_windows, write_chats, write_prompts
from llamba.recipes.real.choices import read
from llamba.recipes.real.measures import CONTEXTS, LATE, Reference, cache_mib, distance, pictures, recalled, references, save, speed, table
from llamba.settings import require

TEACHER = "package:smollm2-135m-instruct"
LENGTH = 512
ANSWERED = 24  # conversations that the teacher answers
SELECT_ROWS = 6  # sequences that the layers are ranked on
HEAD = 8192  # tokens that the draft can propose: the most frequent ones
DRAFT_TOKENS = 40_000  # that the draft learns on
HELD_OUT = 8  # chats that the distance to the teacher is measured on
FIRST_MINUTES = 15.0
RATE = 1e-3
CALIBRATED = 20_480  # tokens that what stands for the rest is fitted on
TOKENS_A_MINUTE = {"half": 7_000, "none": 4_500}  # on two slow cores with bf16 products
FITS = 1 / 3  # of the first minutes
SHARES = {"half": 0.12, "none": 0.88}  # of the others: half of the attention needs few
QUESTIONS = (
    "What is the capital of France?",
    "Name three things that one can do on a rainy day.",
    "My friend is sad because her cat is ill. What should I say to her?",
    "What is water made of?",
    "Write a short sentence about the sea.",
)


@dataclass(frozen=True)
class Choices:
    """What the command line may say."""

    minutes: float = FIRST_MINUTES
    data: str = CHITCHAT
    output: str = "runs/real"
    teacher: str = TEACHER

    def __post_init__(self) -> None:
        require(1 <= self.minutes <= 10_000, "minutes", "a number from 1 to 10,000", self.minutes)


def distillations(part: str, minutes: float) -> list[Distill]:
    """The first minutes' stage and, where there are more of them, one that goes on."""
    common = Distill(
        train="new", kl=1.0, ce=0.0, targets="all", lr=RATE, betas=(0.9, 0.95), clip=1.0, warmup=0.1, floor=0.05,
        batch=1, micro_batch=1, save_every=100, log_every=10,
    )  # fmt: skip
    speed, first = SHARES[part] * TOKENS_A_MINUTE[part], min(minutes, FIRST_MINUTES)
    stages = [replace(common, tokens=int(speed * (1 - FITS) * first))]
    if minutes > first:
        stages.append(replace(common, tokens=int(speed * (minutes - first)), lr=RATE / 2))
    return stages


def _draft(minutes: float) -> Draft:
    """Two layers, with a head of the most frequent tokens. It stands before what more minutes add, so that these go on."""
    return Draft(
        layers=2, head=HEAD, kl=1.0, ce=0.0, targets="all", lr=1e-3, betas=(0.9, 0.95), clip=1.0, warmup=0.05,
        tokens=int(DRAFT_TOKENS * minutes / FIRST_MINUTES), batch=8, micro_batch=4, save_every=50, log_every=10,
    )  # fmt: skip


def chosen(choices: Choices, train: Path) -> list[int]:
    """The layers whose attention is missed most where window and sinks stand in every layer: half of them."""
    select = Select(keep=0.5, method="swap", rows=SELECT_ROWS, micro_batch=4, targets="all")
    recipe = Recipe(
        teacher=choices.teacher, student=Student(mixer="auto", attention=0), data=Data(train=str(train), length=LENGTH), stages=[select],
        output=f"{choices.output}-layers",
    )  # fmt: skip
    layers: list[int] = json.loads((run(recipe) / "layers.json").read_text())["layers"]
    return layers


def recipes(choices: Choices, train: Path, layers: list[int]) -> tuple[Recipe, Recipe]:
    """The runs: with attention in these layers, and, from that student, without any."""
    asked_about = Data(train=str(write_prompts(train, ANSWERED, turns=3)), length=LENGTH)
    answers = PseudoLabel(data=asked_about, turns="all", batch=ANSWERED, max_new_tokens=48, max_prompt=300, unfinished="keep")
    data = Data(train=[str(train), "stage:pseudo_label"], weights=[0.8, 0.2], length=LENGTH, packing=True)
    distilled, *more = distillations("half", choices.minutes)
    half = Recipe(
        teacher=choices.teacher, student=Student(mixer="auto", attention=layers, calibrate=CALIBRATED), data=data,
        stages=[answers, distilled, _draft(min(choices.minutes, FIRST_MINUTES)), *more], output=choices.output,
    )  # fmt: skip
    made = replace(data, train=[str(train), f"{choices.output}/1-pseudo_label/rows"])
    none = Recipe(
        teacher=f"{choices.output}/2-distill", student=Student(mixer="auto", attention=0, calibrate=CALIBRATED), data=made,
        stages=[replace(stage, teacher=choices.teacher) for stage in distillations("none", choices.minutes)],
        output=f"{choices.output}-0pct",
    )  # fmt: skip
    return half, none


def asked(model: Any, tokenizer: Any) -> dict[str, str]:
    """A model's greedy answers to the questions."""
    return {question: Chat(model, tokenizer, Sampling(max_new_tokens=60)).answer(question, io.StringIO()) for question in QUESTIONS}


def distances(model: Any, chats: list[Reference]) -> dict[str, Any]:
    """A student's distance to its teacher, with the recurrence and without."""
    found = distance(model, chats)
    with without_recurrence(model):
        window = distance(model, chats)
    return {
        "perplexity, held-out chats": math.exp(found.nll),
        "KL to the teacher": found.kl,
        f"  behind token {LATE}": found.late,
        "KL, recurrence off": window.kl,
        f"  behind token {LATE}, recurrence off": window.late,
    }


def used(folder: str, model: Any, tokenizer: Any, draft: Any) -> dict[str, Any]:
    """Recall and speed of a model in bf16, its memory, and its answers as `llamba chat` gives them."""
    found: dict[str, Any] = {f"phone number among {names}, %": share for names, share in recalled(folder).items()}
    found |= {f"cache behind {length} tokens, MiB": cache_mib(model, length) for length in CONTEXTS}
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False) for q in QUESTIONS]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    small = copy.deepcopy(model).to(torch.bfloat16)
    found["tokens/s, bf16"] = speed(small, prompts)
    if draft is not None:
        found["tokens/s, bf16, with the draft"] = speed(small, prompts, draft.to(torch.bfloat16))
    return found | {"answers": asked(model, tokenizer)}


def measured(choices: Choices, held: Path, layers: list[int]) -> dict[str, dict[str, Any]]:
    """All models' numbers and answers."""
    teacher, tokenizer = load(choices.teacher)
    chats = references(teacher, held_out_windows(held, tokenizer, LENGTH, HELD_OUT))
    found: dict[str, dict[str, Any]] = {
        "teacher": {"perplexity, held-out chats": math.exp(distance(teacher, chats).nll)} | used(choices.teacher, teacher, tokenizer, None)
    }
    for name, folder, kept in (("50%", choices.output, layers), ("0%", f"{choices.output}-0pct", [])):
        untrained = convert(teacher, mixer="auto", attention=kept)
        found[f"{name}, untrained"] = distances(untrained, chats)
        found[f"{name}, untrained"]["answers"] = asked(untrained, tokenizer)
        del untrained
        model, _ = load(folder)
        draft = load_draft(choices.output, model) if name == "50%" else None
        found[name] = distances(model, chats) | used(folder, model, tokenizer, draft)
    return found


def show(found: dict[str, dict[str, Any]], choices: Choices) -> None:
    """The table, the answers, and where the picture is."""
    numbers = {name: {key: value for key, value in row.items() if key != "answers"} for name, row in found.items()}
    print(f"\n{table(numbers)}\n")
    for question in QUESTIONS:
        print(question)
        for name, row in found.items():
            print(f"  {name:<16}{' '.join(row['answers'][question].split())[:150]}")
    print(f"\npicture: {choices.output}/kl.png; now: llamba chat {choices.output}")


def main() -> None:
    """Fetch, train, measure, show; each part only where it is not done yet."""
    choices, started = read(Choices, sys.argv[1:]), time.time()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    train, held = write_chats(choices.data, Path(f"{choices.output}-data"))
    layers = chosen(choices, train)
    for recipe in recipes(choices, train, layers):
        run(recipe)
    found = measured(choices, held, layers)
    students = {"50%": Path(choices.output), "0%": Path(f"{choices.output}-0pct")}
    pictures(students, {name: found[f"{name}, untrained"]["KL to the teacher"] for name in students}, 
             {name: found[name]["KL to the teacher"] for name in students}, Path(choices.output) / "kl.png")  # fmt: skip
    save(Path(choices.output) / "report.json", {"models": found, "minutes": choices.minutes, "seconds": time.time() - started})
    show(found, choices)


if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors(interrupted="stopped; the same command goes on from here"):
        main()
