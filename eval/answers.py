"""Answers to a benchmark's questions: resumable, and the same on every rerun, since batches are fixed by the order of the questions."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llamba.eval.answerer import LOOKUP, Answered, Answerer, Message, Settings
from llamba.eval.journal import Journal, write_lines
from llamba.eval.judge import digest
from llamba.models.loading import load_config, located

_SAMPLED = 64  # slices of a weight file that enter its fingerprint


@dataclass(frozen=True)
class Question:
    """Turns of a user, answered one after the other at a temperature (0: greedy); `seed` makes its draws its own."""

    id: int | str
    turns: tuple[str, ...]
    temperature: float
    seed: str = ""


def fingerprint(name: str) -> str:
    """What a model's weights and config are, as a hash: files of a folder (sampled), or name and revision on the hub."""
    path = Path(located(name))
    if not path.is_dir():
        return digest([str(path), load_config(str(path))._commit_hash])[:16]
    found = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin")):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for slice_ in range(_SAMPLED):
                opened.seek(slice_ * size // _SAMPLED)
                found.update(opened.read(4096))
    return found.hexdigest()[:16]


def _converse(answerer: Answerer, questions: Sequence[Question], say: Callable[[str], str]) -> list[list[Answered]]:
    """Answers [B][turns] of questions that have equally many turns or fewer; each turn of all questions is one batch."""
    chats: list[list[Message]] = [[] for _ in questions]
    answers: list[list[Answered]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        rows = [row for row, question in enumerate(questions) if turn < len(question.turns)]
        for row in rows:
            chats[row].append({"role": "user", "content": say(questions[row].turns[turn])})
        asked = [questions[row] for row in rows]
        seeds = [f"{answerer.settings.seed}/{q.seed or q.id}/{turn}" for q in asked]
        made = answerer([chats[row] for row in rows], [q.temperature for q in asked], seeds)
        for row, answer in zip(rows, made, strict=True):
            chats[row].append({"role": "assistant", "content": answer.text})
            answers[row].append(answer)
    return answers


def answer_all(name: str, model_id: str, questions: Sequence[Question], settings: Settings, path: Path) -> list[dict[str, Any]]:
    """Answers to all questions, in FastChat's format, in `path`; those that stand there already are not made again.

    Raises ValueError where the file holds answers of another model or made with other settings, and OSError on a full disk.
    """
    made_by = {"model": fingerprint(name), "settings": _relevant(settings)}
    with Journal(path) as journal:
        if other := next((row for row in journal.rows if row.get("made_by") != made_by), None):
            raise ValueError(
                f"{path} holds answers of another model or other settings ({other.get('made_by')}, now {made_by}); "
                "choose another --out, or delete the file"
            )
        have = {row["question_id"]: row for row in journal.rows}
        batches = [questions[i : i + settings.batch] for i in range(0, len(questions), settings.batch)]
        todo = [batch for batch in batches if any(question.id not in have for question in batch)]
        answerer = Answerer(name, settings) if todo else None
        for batch in (shown := tqdm(todo, desc=f"answers {model_id}", unit="batch", disable=None)):
            assert answerer is not None
            for question, answers in zip(batch, _converse(answerer, batch, str), strict=True):
                row = _row(question, answers, model_id, made_by, answerer.template())
                if question.id not in have:
                    _keep(journal, row)
                have[question.id] = row
            if answerer.drafted:
                shown.set_postfix(accepted=f"{answerer.accepted / answerer.drafted:.0%}")
        rows = [have.pop(question.id) for question in questions]
        write_lines(path, [*rows, *have.values()])  # a run with --limit leaves what others answered
    return rows


def _keep(journal: Journal, row: dict[str, Any]) -> None:
    try:
        journal.append(row)
    except OSError as error:
        raise ValueError(f"{journal.path} cannot be written ({error}); the answers so far are kept: make room and run again") from error


def _relevant(settings: Settings) -> dict[str, Any]:
    """What the answers depend on: not the device, but batch and draft, for the last bits of their sums."""
    made = {"batch": settings.batch, "max_new_tokens": settings.max_new_tokens, "seed": settings.seed, "dtype": settings.dtype,
            "system": settings.system}  # fmt: skip
    if settings.bits is not None:
        made["bits"] = settings.bits
    if settings.draft is None:
        return made
    return made | {"draft": LOOKUP if settings.draft == LOOKUP else fingerprint(settings.draft)}


def _row(question: Question, answers: list[Answered], model_id: str, made_by: dict[str, Any], template: str) -> dict[str, Any]:
    turns = [answer.text for answer in answers]
    return {
        "question_id": question.id,
        "answer_id": digest([question.id, made_by, turns])[:22],
        "model_id": model_id,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
        "made_by": made_by,
        "template": template,
        "temperature": question.temperature,
        "tokens": [answer.tokens for answer in answers],
        "stopped": [answer.stopped for answer in answers],
    }


def say_what_stopped(rows: Sequence[dict[str, Any]]) -> str | None:
    """A sentence about answers that were cut, or None."""
    kinds = [kind for row in rows for kind in row["stopped"]]
    cut = {kind: kinds.count(kind) for kind in ("length", "context")}
    if not any(cut.values()):
        return None
    share = math.ceil(100 * sum(cut.values()) / len(kinds))
    return f"{cut['length']} answers were cut at max_new_tokens and {cut['context']} at the end of the context ({share}% of {len(kinds)})"
