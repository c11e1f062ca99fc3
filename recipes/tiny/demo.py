"""The whole path on the embedded teacher: convert half of its layers to Mamba-2, distil, score, answer. `make demo` runs this.

python recipes/tiny/demo.py [key=value ...]        (the recipe's keys, e.g. student.attention=0.25; --help lists them)
"""

import json
import random
import sys
import time
from pathlib import Path

import torch
from language import SKILLS, conversation, exam, grade
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from llamba.base.errors import one_line_errors
from llamba.running.run import run
from llamba.settings import Data, Distill, Recipe, Student
from llamba.settings.overrides import override

HERE = Path(__file__).parent
CONVERSATIONS = 2560
LENGTH = 512

recipe = Recipe(
    teacher=str(HERE / "teacher"),
    student=Student(mixer="mamba2", attention=0.5),
    data=Data(train="runs/demo-data/train.jsonl", length=LENGTH),
    stages=[
        Distill(kl=1.0, ce=0.1, lr=3e-3, betas=(0.9, 0.98), clip=1.0, warmup=30, batch=8, micro_batch=8, steps=320,
                save_every=160, log_every=20),
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


def mean(scores: dict[str, float]) -> float:
    """Mean over skills."""
    return sum(scores.values()) / len(scores)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Scores in per cent, one row per model."""
    head = f"{'exact answers, %':<24}" + "".join(f"{skill:>9}" for skill in (*SKILLS, "mean"))
    lines = [f"{name:<24}" + "".join(f"{100 * s:>9.0f}" for s in (*(row[k] for k in SKILLS), mean(row))) for name, row in rows.items()]
    return "\n".join([head, *lines])


def main() -> None:
    """Run the recipe, score teacher, converted and distilled student, print the table and write it to scores.json."""
    started = time.time()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    chosen = override(recipe, sys.argv[1:], sys.argv[0])
    if chosen.data == recipe.data:
        write_conversations(Path("runs/demo-data/train.jsonl"), CONVERSATIONS, LENGTH)
    last = run(chosen)
    folders = {"teacher": chosen.teacher, "converted, untrained": f"{chosen.output}/0-convert", "distilled": str(last)}
    rows = {}
    for name, folder in folders.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows[name] = score(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer)
    teacher, untrained, distilled = (mean(row) for row in rows.values())
    closed = (distilled - untrained) / (teacher - untrained)
    report = {"scores": rows, "gap_closed": closed, "seconds": round(time.time() - started, 1)}
    (Path(chosen.output) / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{table(rows)}\n\ndistillation closed {closed:.0%} of the gap, in {report['seconds']:.0f} s; now: llamba chat {chosen.output}")


if __name__ == "__main__":
    with one_line_errors():
        main()
