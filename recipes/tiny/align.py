"""What SFT, DPO and both add to the distilled student of the embedded teacher, against table 6 of Mamba-in-Llama (arXiv 2408.15237).

    python recipes/tiny/align.py [--seeds 3] [--distill-steps 160] [--sft-steps 80] [--dpo-steps 60] [--processes 2] [--out runs/align]

For each seed: the student is converted and distilled anew; then SFT, DPO, and SFT followed by DPO, each from that student. Two scores on
held-out questions: exact answers (greedy, mean over skills), and the share of pairs whose right answer is the more likely one. Learning
rates are those with the most exact answers at TUNING_SEED: SFT's after SFT, DPO's after DPO alone and, for the last row, after both. The
table is printed and written to table.json with every number behind it. A run that was stopped goes on with the same command.
"""

import argparse
import json
import multiprocessing
import random
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from demo import HERE, mean, score, write_conversations
from language import QUESTIONS, SKILLS, ask, ask_recall, exam, grade, state_facts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from llamba.base.errors import one_line_errors
from llamba.data.pairs import Pairs, tokenize_pairs
from llamba.running.run import run
from llamba.settings import Data, Distill, Dpo, Recipe, Sft, Stage, Student

LENGTH, PAIR_LENGTH = 256, 512
TRAIN_PAIRS = 96  # per skill: those of 60 steps
TUNING_SEED = 100
DISTILL_RATE, SFT_RATES, DPO_RATES = 1e-2, (3e-4, 1e-3, 3e-3), (3e-5, 1e-4, 3e-4)  # the first: best in ablations.py
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


def scores(folder: Path, out: Path, per_skill: int) -> dict[str, float]:
    """Both scores of a model, kept beside it."""
    kept = folder / f"scores-{per_skill}.json"
    if not kept.exists():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
        pairs = Pairs(out / "data" / f"held_out-{per_skill}" / "train")
        kept.write_text(json.dumps({"exact": mean(score(model, tokenizer, per_skill)), "preferred": preferred(model, pairs)}) + "\n")
    return json.loads(kept.read_text())


class Seed:
    """The models of one seed, each made once: distilled, and what SFT and DPO make of it."""

    def __init__(self, seed: int, args: argparse.Namespace):
        self.seed, self.args, self.out = seed, args, args.out / f"seed{seed}"
        self.chats = Data(train=str(args.out / "data" / "chats.jsonl"), length=LENGTH)
        self.pairs = Data(train=str(args.out / "data" / "pairs.jsonl"), length=PAIR_LENGTH)

    def distilled(self) -> Path:
        """The student of this seed, before SFT and DPO."""
        common = dict(betas=(0.9, 0.98), clip=1.0, warmup=10, batch=8, micro_batch=8, save_every=80)
        stage = Distill(kl=1.0, ce=0.1, lr=DISTILL_RATE, steps=self.args.distill_steps, **common, **COMMON)
        return run(Recipe(str(HERE / "teacher"), Student(mixer="mamba2"), self.chats, [stage], str(self.out / "distilled"), self.seed))

    def sft(self, lr: float) -> Path:
        """SFT behind distillation."""
        stage = Sft(lr=lr, batch=16, micro_batch=8, steps=self.args.sft_steps, data=self.chats, **COMMON)
        return self._further(self.distilled(), stage, f"sft-{lr:g}")

    def dpo(self, lr: float, sft: float | None) -> Path:
        """DPO behind SFT at its rate, or (None) behind distillation."""
        stage = Dpo(lr=lr, beta=0.1, batch=16, micro_batch=8, steps=self.args.dpo_steps, data=self.pairs, **COMMON)
        first, name = (self.distilled(), "dpo") if sft is None else (self.sft(sft), f"sft-{sft:g}-dpo")
        return self._further(first, stage, f"{name}-{lr:g}")

    def _further(self, model: Path, stage: Stage, name: str) -> Path:
        return run(Recipe(str(model), Student(mixer="mamba2", attention=1.0), self.chats, [stage], str(self.out / name), self.seed))


def tuned(args: argparse.Namespace) -> dict[str, float]:
    """The learning rates of SFT, of DPO alone and of DPO behind SFT."""
    one = Seed(TUNING_SEED, args)

    def exact(folder: Path) -> float:
        return scores(folder, args.out, args.per_skill)["exact"]

    sft = max(SFT_RATES, key=lambda lr: exact(one.sft(lr)))
    alone = max(DPO_RATES, key=lambda lr: exact(one.dpo(lr, None)))
    return {"sft": sft, "dpo": alone, "sft_dpo": max(DPO_RATES, key=lambda lr: exact(one.dpo(lr, sft)))}


def one_seed(seed: int, args: argparse.Namespace, rates: dict[str, float]) -> dict[str, dict[str, float]]:
    """Both scores of the four models of a seed."""
    quiet()
    one = Seed(seed, args)
    folders = {
        "distilled": one.distilled(),
        "+ SFT": one.sft(rates["sft"]),
        "+ DPO": one.dpo(rates["dpo"], None),
        "+ SFT + DPO": one.dpo(rates["sft_dpo"], rates["sft"]),
    }
    return {name: scores(folder, args.out, args.per_skill) for name, folder in folders.items()}


def quiet() -> None:
    """No progress bars and warnings of transformers, in this process."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


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
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/align"))
    args = parser.parse_args()
    quiet()
    data = args.out / "data"
    write_conversations(data / "chats.jsonl", 2560, LENGTH)
    write_pairs(data / "pairs.jsonl", TRAIN_PAIRS, held_out=False)
    held_out = write_pairs(data / "held_out.jsonl", args.per_skill, held_out=True)
    tokenised = data / f"held_out-{args.per_skill}"
    if not tokenised.exists():
        tokenize_pairs(Data(train=str(held_out), length=1024), AutoTokenizer.from_pretrained(HERE / "teacher"), "pairs", tokenised)
    rates = tuned(args)
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        seeds = list(pool.map(one_seed, range(args.seeds), [args] * args.seeds, [rates] * args.seeds))
    settings = vars(args) | {"out": str(args.out), "rates": rates}
    (args.out / "table.json").write_text(json.dumps({"settings": settings, "seeds": seeds}, indent=2) + "\n")
    print(f"rates: {rates}\n{table(seeds)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
