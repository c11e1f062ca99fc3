"""The whole path on the embedded teacher: convert half of its layers, distil, score, answer. `make demo` runs this.

python recipes/tiny/demo.py [key=value ...]        (the recipe's keys, e.g. student.attention=0.25; --help lists them)

The new layers are Mamba-2 beside attention's own window and sinks, which are short here because the questions are. Two untrained rows
stand beside the result: the start of the papers (Mamba-2 alone), and what window and sinks do without any recurrence.
Shapes: T tokens of a conversation, V vocabulary.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from language import SKILLS, conversation, exam, grade
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from llamba.base.errors import one_line_errors
from llamba.models.convert import convert
from llamba.models.hybrid import RECURRENT
from llamba.models.mixers import Mixer, without_recurrence
from llamba.running.run import run
from llamba.settings import Data, Distill, Recipe, Student
from llamba.settings.overrides import override

HERE = Path(__file__).parent
CONVERSATIONS = 2560
LENGTH = 512
LATE = 256  # tokens behind this position are shown apart
JOIN_RATE = 0.1  # of what the recurrence counts beside its window, which starts at nothing: at 3e-3 it would hardly move
HELD_OUT = 12  # conversations that the distance to the teacher is measured on

recipe = Recipe(
    teacher=str(HERE / "teacher"),
    student=Student(mixer="mamba2", attention=0.5, options={"window": 16, "sinks": 4, "rotary": True}),
    data=Data(train="runs/demo-data/train.jsonl", length=LENGTH),
    stages=[
        Distill(kl=1.0, ce=0.0, targets="all", lr=3e-3, join_lr=JOIN_RATE, betas=(0.9, 0.98), clip=1.0, warmup=30,
                batch=8, micro_batch=8, steps=120, save_every=60, log_every=10),
    ],
    output="runs/demo",
)  # fmt: skip


def write_conversations(path: Path, rows: int, length: int, seed: int = 0) -> None:
    """Training conversations of the chat language as rows of `messages`, made once."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        for index in range(rows):
            file.write(json.dumps({"messages": conversation(random.Random(f"{seed}/{index}"), length)}) + "\n")
    partial.replace(path)


@torch.inference_mode()
def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, per_skill: int = 40, seed: int = 1) -> dict[str, float]:
    """Share of exact answers on held-out prompts, greedy, per skill."""
    tokenizer.padding_side, scores = "left", {}
    for skill in SKILLS:
        rng = random.Random(f"{seed}/{skill}")
        prompts, answers = zip(*(exam(skill, rng) for _ in range(per_skill)), strict=True)
        texts = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, tokenize=False)
        batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)
        out = model.generate(**batch, max_new_tokens=32, do_sample=False)
        replies = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        scores[skill] = sum(map(grade, replies, answers)) / per_skill
    return scores


def held_out(tokenizer: PreTrainedTokenizerBase, count: int = HELD_OUT, length: int = LENGTH, seed: int = 7) -> torch.Tensor:
    """The first `length` tokens of conversations that no training sees: [count, T]."""
    rows, index = [], 0
    while len(rows) < count:
        messages = conversation(random.Random(f"{seed}/{index}"), 2 * length)
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        rows += [ids[:length]] if len(ids) >= length else []
        index += 1
    return torch.tensor(rows)


@torch.inference_mode()
def divergence(model: PreTrainedModel, teacher: PreTrainedModel, tokens: torch.Tensor) -> tuple[float, float]:
    """KL(teacher || model) over all tokens and over those behind LATE, nats per token."""
    own, theirs = (m(tokens, use_cache=False).logits.float().log_softmax(-1) for m in (model, teacher))  # [B, T, V]
    kl = (theirs.exp() * (theirs - own)).sum(-1)
    return kl.mean().item(), kl[:, LATE:].mean().item()


def mean(scores: dict[str, float]) -> float:
    """Mean over skills."""
    return sum(scores[skill] for skill in SKILLS) / len(SKILLS)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Scores in per cent and distances to the teacher, one row per model."""
    head = f"{'exact answers, %':<32}" + "".join(f"{skill:>9}" for skill in (*SKILLS, "mean")) + f"{'KL':>9}{f'KL>{LATE}':>9}"
    lines = [head]
    for name, row in rows.items():
        shares = "".join(f"{100 * share:>9.0f}" for share in (*(row[skill] for skill in SKILLS), mean(row)))
        lines.append(f"{name:<32}{shares}{row['kl']:>9.3g}{row['kl_late']:>9.3g}")
    return "\n".join(lines)


def measure(chosen: Recipe, last: Path) -> dict[str, dict[str, float]]:
    """Exact answers and distances of the teacher, the two untrained students and the distilled one, also without its recurrence."""
    tokenizer = AutoTokenizer.from_pretrained(chosen.teacher)
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (chosen.teacher, f"{chosen.output}/0-convert", last)]
    teacher, untrained, distilled = models
    kept = [layer for layer, kind in enumerate(distilled.config.layer_types) if kind != RECURRENT]
    published = convert(teacher, mixer="mamba2", attention=kept)
    tokens, rows = held_out(tokenizer), {}

    def add(name: str, model: PreTrainedModel) -> None:
        kl, late = divergence(model, teacher, tokens)
        rows[name] = score(model, tokenizer) | {"kl": kl, "kl_late": late}

    add("teacher", teacher)
    add("published start, untrained", published)
    if any(module.sight for module in untrained.modules() if isinstance(module, Mixer)):
        with without_recurrence(untrained):
            add("window and sinks, untrained", untrained)
    else:
        add("converted, untrained", untrained)
    add("distilled", distilled)
    with without_recurrence(distilled):
        add("distilled, recurrence off", distilled)
    return rows


def main() -> None:
    """Run the recipe, measure, print the table and write it to scores.json."""
    started = time.time()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    chosen = override(recipe, sys.argv[1:], sys.argv[0])
    if chosen.data == recipe.data:
        write_conversations(Path("runs/demo-data/train.jsonl"), CONVERSATIONS, LENGTH)
    rows = measure(chosen, run(chosen))
    best, worst, found = (mean(rows[name]) for name in ("teacher", "published start, untrained", "distilled"))
    closed = (found - worst) / (best - worst) if best > worst else math.nan
    report = {"scores": rows, "gap_closed": closed, "seconds": round(time.time() - started, 1)}
    (Path(chosen.output) / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{table(rows)}\n\ndistillation closed {closed:.0%} of the gap, in {report['seconds']:.0f} s; now: llamba chat {chosen.output}")


if __name__ == "__main__":
    with one_line_errors():
        main()
