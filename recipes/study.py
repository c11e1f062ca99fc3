"""The papers' claims tried on a real chat model: every arm converted, trained and scored alike, and whether each claim holds here.

    python recipes/study.py [tokens=2048] [seeds=2] [only=50,25-selected-layers] [mixer=auto] [data=FILE] [text=FILE] [questions=50]

The teacher is SmolLM2-135M-Instruct from a package, the chats are the chitchat package's (MIT licence), the text is GSM8K's from a
package; files of yours may stand for chats and text. Every arm takes the same tokens, all its stages together, and the same rates, which
are not tuned arm by arm; `tokens=2048` takes some 30 minutes of one CPU core for two seeds. A seed says which chats are read, and draws
what starts at random. `mixer=mamba2` is the papers' own, without a window. `only` names arms as in `recipes/real/arms.py`, in small
letters, with - between words.

A row for every finished arm and seed goes to `results`, and the tables stand in `output`/table.md. An arm and seed that `results` has with
the same settings is not done again: after an interruption the same command goes on.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llamba.base import provenance
from llamba.base.errors import one_line_errors
from llamba.base.packages import carried_file, is_carried
from llamba.base.progress import quiet_libraries
from llamba.eval.texts import windows_of
from llamba.models.loading import load_tokenizer, located
from llamba.recipes.real.arms import ARMS, TEACHER, Budget, Study, slug, trained_tokens
from llamba.recipes.real.chats import CHITCHAT, held_out_windows, write_chats
from llamba.recipes.real.choices import read
from llamba.recipes.real.claims import OFF, RULE, Scores, arms_table, claims_table
from llamba.recipes.real.exam import MATH, Exam, Size, gsm8k
from llamba.recipes.real.questions import questions, write_pairs
from llamba.settings import require

SOLVED = (TEACHER, "50%")  # answer GSM8K, the first seed's
Row = dict[str, Any]


@dataclass(frozen=True)
class Choices:
    """What the command line may say. `text` is made of `math` where it names no file; `questions` of `math` are answered."""

    tokens: int = Budget.tokens
    seeds: int = 2
    only: str = ""
    mixer: str = "auto"
    teacher: str = "package:smollm2-135m-instruct"
    data: str = CHITCHAT
    text: str = ""
    math: str = "package:gsm8k"
    questions: int = 50
    output: str = "runs/study"
    results: str = "eval/results/study_cpu.jsonl"

    def __post_init__(self) -> None:
        require(1_024 <= self.tokens <= 10**9, "tokens", "a number from 1,024 to 1,000,000,000", self.tokens)
        require(1 <= self.seeds <= 100, "seeds", "a number from 1 to 100", self.seeds)
        require(0 <= self.questions <= 1319, "questions", "a number from 0 to 1,319", self.questions)

    def arms(self) -> list[str]:
        """The arms to do. Raises ValueError for a name that none has."""
        known = {slug(name): name for name in (TEACHER, *ARMS)}
        asked = [part.strip() for part in self.only.split(",") if part.strip()] or list(known)
        for name in asked:
            require(name in known, "only", f"of {', '.join(known)}", name)
        return [known[name] for name in asked]

    def math_file(self) -> Path:
        """GSM8K's file. Raises ValueError where it cannot be had, and for a file of another name."""
        found = carried_file(self.math) if is_carried(self.math) else Path(self.math)
        require(found.parts[-2:] == ("gsm8k", "test.jsonl") and found.is_file(), "math", "a file gsm8k/test.jsonl", str(found))
        return found

    def held_out_text(self) -> str:
        """The text that distances are measured on. Raises ValueError as `math_file`."""
        if self.text:
            return Path(self.text).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in self.math_file().read_text(encoding="utf-8").splitlines()]
        return "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)


def prepare(choices: Choices, budget: Budget, size: Size) -> tuple[Study, Exam]:
    """Rows, questions and the teacher's part of the scores. Raises ValueError for data that cannot be had, or are too few."""
    text, folder = choices.held_out_text(), Path(choices.output)
    train, held = write_chats(choices.data, folder / slug(choices.data))
    pairs = write_pairs(train.with_name("pairs.jsonl"), questions(train, budget.pairs))
    tokenizer = load_tokenizer(choices.teacher)
    windows = {
        "chat": held_out_windows(held, tokenizer, size.length, size.chats),
        "text": windows_of(tokenizer, text, size.length - 1, size.text),
    }
    study = Study(choices.teacher, budget, str(train), str(pairs), folder / "arms", choices.mixer)
    return study, Exam(choices.teacher, windows, questions(held, size.questions), size)


def scored(study: Study, exam: Exam, name: str, seed: int) -> Row:
    """Train an arm and score it: what its row says, its scores with the recurrence off apart."""
    started, begun = time.time(), time.process_time()
    folder = study.teacher if name == TEACHER else str(study.trained(name, seed))
    trained = time.time()
    window = name in ARMS and ARMS[name].window and study.mixer == "auto"
    scores, off = exam.scores(folder, window)
    return {
        "measured": "claims", "arm": name, "seed": seed, "tokens": trained_tokens(name, study.budget), "scores": scores,
        "recurrence_off": off, "seconds": {"training": round(trained - started, 1), "scores": round(time.time() - trained, 1)},
        "cpu_seconds": round(time.process_time() - begun, 1),
    }  # fmt: skip


def solved(study: Study, choices: Choices, size: Size, name: str) -> Row:
    """GSM8K's row of an arm, which is trained again where its weights are gone."""
    folder = located(study.teacher) if name == TEACHER else str(study.trained(name, 0))
    out = Path(choices.output) / "gsm8k" / slug(name)
    share = gsm8k(folder, choices.math_file(), out, choices.questions, size.reasoning)
    return {"measured": "gsm8k", "arm": name, "seed": 0, "questions": choices.questions, "scores": {MATH: share}}


def finished(choices: Choices, settings: dict[str, Any]) -> list[Row]:
    """The rows of these settings that are there, in the order of the arms."""
    path = Path(choices.results)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    order = [TEACHER, *ARMS]
    return sorted((row for row in rows if row["settings"] == settings), key=lambda row: (order.index(row["arm"]), row["seed"]))


def report(rows: list[Row], exam: Exam, folder: Path) -> str:
    """The tables of what is finished, written to table.md."""
    arms: dict[str, dict[int, Scores]] = {}
    for row in rows:
        arms.setdefault(row["arm"], {}).setdefault(row["seed"], {}).update(row["scores"])
        if row.get("recurrence_off"):
            arms.setdefault(row["arm"] + OFF, {})[row["seed"]] = row["recurrence_off"]
    of_seeds = {name: list(seeds.values()) for name, seeds in arms.items()}
    text = f"{arms_table(of_seeds)}\n\n{RULE}\n\n{claims_table(of_seeds, exam.counts())}\n"
    partial = folder / "table.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / "table.md")
    return text


def do(choices: Choices, size: Size, budget: Budget) -> str:
    """Everything that is left of a study, seed by seed; returns its tables. Raises ValueError as `run` and `prepare`."""
    names, folder = choices.arms(), Path(choices.output)
    settings = {key: value for key, value in asdict(choices).items() if key not in ("only", "output", "results", "seeds", "questions")}
    settings |= {"budget": asdict(budget), "size": json.loads(json.dumps(asdict(size)))}
    study, exam = prepare(choices, budget, size)
    done = {(row["measured"], row["arm"], row["seed"]) for row in finished(choices, settings)}

    def keep(row: Row) -> None:
        provenance.append_row(choices.results, row | {"settings": settings})
        report(finished(choices, settings), exam, folder)
        print(f"{row['arm']}, seed {row['seed']}: {', '.join(f'{key} {value:.4g}' for key, value in row['scores'].items())}", flush=True)

    Path(choices.results).parent.mkdir(parents=True, exist_ok=True)
    for seed in range(choices.seeds):
        for place, name in enumerate(names):
            if ("claims", name, seed) not in done and (name != TEACHER or seed == 0):
                keep(scored(study, exam, name, seed))
            study.finish(seed, [other for other in names[place + 1 :] if other != TEACHER and ("claims", other, seed) not in done])
    for name in SOLVED:
        if choices.questions and name in names and ("gsm8k", name, 0) not in done:
            keep(solved(study, choices, size, name))
    return report(finished(choices, settings), exam, folder)


def main() -> None:
    """Read the command line, do what is left, and print the tables."""
    choices = read(Choices, sys.argv[1:])
    print(do(choices, Size(), replace(Budget(), tokens=choices.tokens)))
    print(f"tables: {choices.output}/table.md; rows: {choices.results}")


if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors(interrupted="stopped; the same command goes on from here"):
        main()
