"""What SFT, DPO and both add to the distilled student of the embedded teacher, against table 6 of Mamba-in-Llama (arXiv 2408.15237).

    python recipes/tiny/align.py [--seeds 3] [--distill-steps 160] [--sft-steps 80] [--dpo-steps 60] [--out runs/align]

For each seed: the student is converted and distilled anew; then SFT, DPO, and SFT followed by DPO, each from that student. Two scores on
held-out questions: exact answers (greedy, mean over skills), and the share of pairs whose right answer is the more likely one. The
table is printed and written to table.json with every number behind it. A run that was stopped goes on with the same command.
"""

import argparse
import json
import random
import statistics
from pathlib import Path

import torch
from demo import HERE, mean, score, write_conversations
from language import QUESTIONS, SKILLS, ask, ask_recall, exam, grade, state_facts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from llamba.errors import one_line_errors
from llamba.pairs import Pairs, prepare
from llamba.recipe import Data, Distill, Recipe, Student
from llamba.run import run
from llamba.settings import Dpo, Sft, Stage

LENGTH = 512
PAPER = {"distilled": 5.55, "+ SFT": 5.61, "+ DPO": 5.42, "+ SFT + DPO": 6.69}  # MT-Bench, Zephyr, 50% attention
COMMON = dict(precision="fp32", log_every=20)


def pair(skill: str, rng: random.Random, held_out: bool) -> dict[str, object]:
    """A question with its right answer and the right answer to another question of the same skill."""
    if held_out:
        prompt, answer = exam(skill, rng)
    elif skill in QUESTIONS:
        question, answer = ask(skill, rng)
        prompt = [{"role": "user", "content": question}]
    else:
        turns, facts = state_facts(rng, rng.choice((4, 8, 16)))
        question, answer = ask_recall(rng, facts)
        prompt = [message for turn in turns for message in turn] + [{"role": "user", "content": question}]
    wrong = answer
    while grade(wrong, answer):
        wrong = ask(skill, rng)[1] if skill in QUESTIONS else ask_recall(rng, state_facts(rng, 8)[1])[1]
    sides = {"chosen": answer, "rejected": wrong}
    return {"prompt": prompt, **{side: [{"role": "assistant", "content": text}] for side, text in sides.items()}}


def write_pairs(path: Path, per_skill: int, held_out: bool) -> Path:
    rng = random.Random(f"pairs/{held_out}")
    rows = [pair(skill, rng, held_out) for _ in range(per_skill) for skill in SKILLS]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.inference_mode()
def preferred(model, pairs: Pairs) -> float:
    """Share of pairs whose chosen answer has the higher log-probability."""
    right = 0
    for row in (pairs[index] for index in range(len(pairs))):
        sides = []
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            logs = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].float().log_softmax(-1)
            sides.append(logs.gather(1, torch.tensor(row[side])[:, None]).sum())
        right += bool(sides[0] > sides[1])
    return right / len(pairs)


def scores(folder: Path, pairs: Pairs, per_skill: int) -> dict[str, float]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    return {"exact": mean(score(model, tokenizer, per_skill)), "preferred": preferred(model, pairs)}


def one_seed(seed: int, args: argparse.Namespace, chats: Data, pairs: Data, exam_pairs: Pairs) -> dict[str, dict[str, float]]:
    """Both scores of the four models of a seed."""
    out = args.out / f"seed{seed}"
    distill = Distill(
        kl=1.0, ce=0.1, lr=3e-3, clip=1.0, warmup=30, batch=8, micro_batch=8, steps=args.distill_steps, save_every=80, **COMMON
    )
    sft = Sft(lr=3e-4, batch=16, micro_batch=4, steps=args.sft_steps, data=chats, **COMMON)
    dpo = Dpo(lr=1e-4, beta=0.1, batch=16, micro_batch=8, steps=args.dpo_steps, data=pairs, **COMMON)
    first = Recipe(str(HERE / "teacher"), Student(), chats, [distill], str(out / "distilled"), seed)
    folders = {"distilled": run(first)}
    stages: dict[str, list[Stage]] = {"+ SFT": [sft], "+ DPO": [dpo], "+ SFT + DPO": [sft, dpo]}
    for name, own in stages.items():
        place = out / name.replace("+ ", "").replace(" ", "-").lower()
        folders[name] = run(Recipe(str(folders["distilled"]), Student(attention=1.0), chats, own, str(place), seed))
    return {name: scores(folder, exam_pairs, args.per_skill) for name, folder in folders.items()}


def error(values: list[float]) -> float:
    """Standard error of a mean; infinite for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("inf")


def verdict(name: str, seeds: list[dict[str, dict[str, float]]]) -> str:
    """Whether a row's exact answers say what the paper's MT-Bench says, by differences within seeds and two standard errors.

    The paper: SFT + DPO is above the distilled student, and SFT alone and DPO alone are below SFT + DPO.
    """
    if name == "distilled":
        return "-"
    low, high = ("distilled", name) if name == "+ SFT + DPO" else (name, "+ SFT + DPO")
    gains = [seed[high]["exact"] - seed[low]["exact"] for seed in seeds]
    gain, doubt = statistics.mean(gains), 2 * error(gains)
    return "agrees" if gain > doubt else "disagrees" if gain < -doubt else "cannot tell"


def table(seeds: list[dict[str, dict[str, float]]]) -> str:
    """Markdown: mean ± standard error over seeds, in per cent."""
    lines = ["| | exact answers, % | right answer preferred, % | MT-Bench in the paper | the paper's order |", "|---|---|---|---|---|"]
    for name in PAPER:
        cells = []
        for key in ("exact", "preferred"):
            values = [100 * seed[name][key] for seed in seeds]
            cells.append(f"{statistics.mean(values):.1f}" + (f" ± {error(values):.1f}" if len(values) > 1 else ""))
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {PAPER[name]} | {verdict(name, seeds)} |")
    return "\n".join(lines)


def main() -> None:
    """Train and score every seed, print the table, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--distill-steps", type=int, default=160)
    parser.add_argument("--sft-steps", type=int, default=80)
    parser.add_argument("--dpo-steps", type=int, default=60)
    parser.add_argument("--per-skill", type=int, default=40, help="questions and pairs per skill")
    parser.add_argument("--out", type=Path, default=Path("runs/align"))
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data = args.out / "data"
    write_conversations(data / "chats.jsonl", 2560, LENGTH)
    chats = Data(train=str(data / "chats.jsonl"), length=LENGTH)
    train, held_out = (write_pairs(data / f"{name}.jsonl", args.per_skill, name == "held_out") for name in ("pairs", "held_out"))
    pairs = Data(train=str(train), length=LENGTH)
    tokenised = data / f"held_out-{args.per_skill}"
    if not tokenised.exists():
        prepare(Data(train=str(held_out), length=1024), AutoTokenizer.from_pretrained(HERE / "teacher"), "pairs", tokenised)
    seeds = [one_seed(seed, args, chats, pairs, Pairs(tokenised / "train")) for seed in range(args.seeds)]
    (args.out / "table.json").write_text(json.dumps({"settings": vars(args) | {"out": str(args.out)}, "seeds": seeds}, indent=2) + "\n")
    print(table(seeds))


if __name__ == "__main__":
    with one_line_errors():
        main()
