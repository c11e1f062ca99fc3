"""The papers' claims tried on a real chat model: every arm converted, trained and scored alike, and whether each claim holds here.

    python recipes/study.py [minutes=35] [seeds=2] [only=50,25-selected-layers] [mixer=auto] [data=FILE] [sft=FILE] [pairs=FILE] [text=FILE]

The teacher is SmolLM2-135M-Instruct from a package, the chats are the chitchat package's (MIT licence), the text is GSM8K's from a
package; files of yours may stand for all three. Every arm takes the same tokens, all its stages together, and the same rates, which
are not tuned arm by arm. `minutes` is what all arms and seeds take, scores included: the teacher's speed on this machine is measured, and
says how many tokens that are. `mixer=mamba2` is the papers' own, without a window. `only` names arms as in `recipes/real/arms.py`, in small
letters, with - between words.

A row for every finished arm and seed goes to `results`, the table to `output`/table.md after each of them. What is finished is kept: after
an interruption the same command goes on.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llamba.base import provenance
from llamba.base.errors import one_line_errors
from llamba.base.packages import carried_file, is_carried
from llamba.base.progress import quiet_libraries
from llamba.eval.texts import windows_of
from llamba.models.loading import load_tokenizer
from llamba.recipes.real import pace
from llamba.recipes.real.arms import ARMS, Budget, Study, slug
from llamba.recipes.real.chats import CHITCHAT, held_out_windows, write_chats
from llamba.recipes.real.choices import read
from llamba.recipes.real.claims import CLAIMS, LEAST, OFF, Scores, arms_table, claims_table
from llamba.recipes.real.exam import PREFERRED, Exam, Size
from llamba.recipes.real.measures import save
from llamba.recipes.real.questions import split_pairs, spread, write_pairs
from llamba.settings import require

TEACHER_ARM = "teacher"
SOLVED = (TEACHER_ARM, "50%")  # answer GSM8K
PREFERRING = {arm for claim in CLAIMS if PREFERRED in claim.by for arm in (claim.better, claim.worse)}


@dataclass(frozen=True)
class Choices:
    """What the command line may say. `pairs` and `sft` are made of the chats, `text` of `math`, where they name no file."""

    minutes: float = 35.0
    seeds: int = 2
    only: str = ""
    mixer: str = "auto"
    teacher: str = "package:smollm2-135m-instruct"
    data: str = CHITCHAT
    sft: str = ""
    pairs: str = ""
    text: str = ""
    math: str = "package:gsm8k"
    questions: int = 50
    output: str = "runs/study"
    results: str = "eval/results/claims.jsonl"

    def __post_init__(self) -> None:
        require(1 <= self.seeds <= 100, "seeds", "a number from 1 to 100", self.seeds)
        require(0 <= self.questions <= 1319, "questions", "a number from 0 to 1,319", self.questions)
        require(1 <= self.minutes <= 100_000, "minutes", "a number from 1 to 100,000", self.minutes)

    def arms(self) -> list[str]:
        """The arms to do. Raises ValueError for a name that none has."""
        known = {slug(name): name for name in (TEACHER_ARM, *ARMS)}
        asked = [part.strip() for part in self.only.split(",") if part.strip()] or list(known)
        for name in asked:
            require(name in known, "only", f"of {', '.join(known)}", name)
        return [known[name] for name in asked]


def _math(choices: Choices) -> Path | None:
    """GSM8K's file, where it is needed. Raises ValueError where it cannot be had, and for a file of another name."""
    if choices.text and not choices.questions:
        return None
    found = carried_file(choices.math) if is_carried(choices.math) else Path(choices.math)
    require(found.parts[-2:] == ("gsm8k", "test.jsonl") and found.is_file(), "math", "a file gsm8k/test.jsonl", str(found))
    return found


def _text(choices: Choices, math: Path | None) -> str:
    if choices.text:
        return Path(choices.text).read_text(encoding="utf-8")
    assert math is not None
    rows = [json.loads(line) for line in math.read_text(encoding="utf-8").splitlines()]
    return "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)


def prepare(choices: Choices, budget: Budget, size: Size) -> tuple[Study, Exam]:
    """Rows, questions and the teacher's part of the scores. Raises ValueError for data that cannot be had, or are too few."""
    folder = Path(choices.output)
    train, held = write_chats(choices.data, folder / "data")
    math = _math(choices)
    tokenizer = load_tokenizer(choices.teacher)
    learnt, asked = split_pairs(choices.pairs, train, held)
    rows = write_pairs(folder / "data" / "pairs.jsonl", learnt[: budget.pairs])
    study = Study(choices.teacher, budget, str(train), choices.sft or str(train), str(rows), folder / "arms", choices.mixer)
    windows = {
        "chat": held_out_windows(held, tokenizer, size.length, size.chats),
        "text": windows_of(tokenizer, _text(choices, math), size.length - 1, size.text),
    }
    return study, Exam(choices.teacher, windows, spread(asked, size.questions), size, math)


def scored(study: Study, exam: Exam, choices: Choices, name: str, seed: int) -> dict[str, Any]:
    """Train an arm and score it: what its row says. The scores with the recurrence off stand under a name of their own."""
    started, begun = time.time(), time.process_time()
    folder = study.teacher if name == TEACHER_ARM else str(study.trained(name, seed))
    trained = time.time()
    scores = {name: exam.scores(folder, name in PREFERRING)}
    if name in ARMS and ARMS[name].window and choices.mixer == "auto":
        scores[name + OFF] = exam.window_alone(folder)
    if name in SOLVED and seed == 0 and choices.questions:
        scores[name]["GSM8K, %"] = exam.gsm8k(folder, Path(choices.output) / "gsm8k" / slug(name), choices.questions)
    seconds = {"training": round(trained - started, 1), "scores": round(time.time() - trained, 1)}
    cpu = round(time.process_time() - begun, 1)
    return {"benchmark": "claims", "arm": name, "seed": seed, "scores": scores, "seconds": seconds, "cpu_seconds": cpu}


def settled(choices: Choices, budget: Budget | None) -> tuple[Budget, dict[str, Any]]:
    """The budget, measured where none is given, and all that scores depend on; both stay with the output folder.

    Raises ValueError where that holds a study with other settings.
    """
    path = Path(choices.output) / "study.json"
    given = {key: value for key, value in asdict(choices).items() if key not in ("only", "output", "results", "seeds")}
    if not path.exists():
        made = budget or pace.budget(choices.minutes, choices.seeds, pace.forward_rate(choices.teacher))
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, {"choices": given, "budget": asdict(made)})
    there = json.loads(path.read_text())
    other = [f"{key}={there['choices'].get(key)}, not {value}" for key, value in given.items() if there["choices"].get(key) != value]
    if other:
        raise ValueError(f"{choices.output} holds a study with {'; '.join(other)}; give the old values, or another output")
    return Budget(**there["budget"]), there["choices"] | there["budget"]


def finished(folder: Path) -> list[dict[str, Any]]:
    """The rows of a study that are there, in the order of the arms."""
    rows = [json.loads(path.read_text()) for path in sorted((folder / "done").glob("*.json"))]
    order = [TEACHER_ARM, *ARMS]
    return sorted(rows, key=lambda row: (order.index(row["arm"]), row["seed"]))


def report(folder: Path, settings: dict[str, Any], counts: dict[str, int]) -> str:
    """The tables of what is finished, written to table.md."""
    rows, arms = finished(folder), dict[str, list[Scores]]()
    for row in rows:
        for name, scores in row["scores"].items():
            arms.setdefault(name, []).append(scores)
    seconds, made = sum(sum(row["seconds"].values()) for row in rows), provenance.stamp()
    asked = ", ".join(f"{name.removesuffix(', %')} {count}" for name, count in counts.items())
    tokens, aligned = settings["tokens"], settings["aligned"]
    how = (
        f"`{made['command']}` (commit {made['commit']}, {made['hardware']}, {seconds:.0f} s, {len(rows)} arms and seeds). "
        f"{tokens:,} tokens distilled behind {aligned:,} of alignment, or {tokens + aligned:,} where there is one of the two; windows of "
        f"{settings['length']} tokens, mixer {settings['mixer']}. Nats per token, mean ± standard deviation over seeds. A verdict needs "
        f"two standard errors, and {LEAST:.0%} of a distance. Questions behind each share: {asked}."
    )
    text = f"{how}\n\n{arms_table(arms)}\n\n{claims_table(arms, counts)}\n"
    partial = folder / "table.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / "table.md")
    return text


def do(choices: Choices, size: Size, budget: Budget | None = None) -> str:
    """Everything that is left of a study, seed by seed; returns its tables. Raises ValueError as `run`, `settled` and `prepare`."""
    names, folder = choices.arms(), Path(choices.output)
    found, settings = settled(choices, budget)
    study, exam = prepare(choices, found, size)
    (folder / "done").mkdir(exist_ok=True)
    for seed in range(choices.seeds):
        for name in names if seed == 0 else [name for name in names if name != TEACHER_ARM]:
            path = folder / "done" / f"{slug(name)}-{seed}.json"
            if not path.exists():
                row = scored(study, exam, choices, name, seed)
                Path(choices.results).parent.mkdir(parents=True, exist_ok=True)
                provenance.append_row(choices.results, row | {"settings": settings})
                save(path, row)
                report(folder, settings, exam.counts())
                kl, seconds = row["scores"][name]["chat KL"], sum(row["seconds"].values())
                print(f"{name}, seed {seed}: chat KL {kl:.4g}, {seconds:.0f} s", flush=True)
            study.finish(seed, [other for other in ARMS if not (folder / "done" / f"{slug(other)}-{seed}.json").exists()])
    return report(folder, settings, exam.counts())


def main() -> None:
    """Read the command line, do what is left, and print the tables."""
    choices = read(Choices, sys.argv[1:])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(do(choices, Size()))
    print(f"tables: {choices.output}/table.md; rows: {choices.results}")


if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors(interrupted="stopped; the same command goes on from here"):
        main()
