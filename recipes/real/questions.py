"""Questions with two answers of which the first is better, out of conversations or preference pairs; and such pairs as rows to train on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamba.data import sources

Messages = list[dict[str, str]]
TURN = 3  # the message of a conversation that is asked for, where there are so many
HELD_OUT = 5  # one pair of so many is held out


@dataclass(frozen=True)
class Question:
    """A conversation, and answers to it of which the first is the better one."""

    prompt: Messages
    answers: list[str]


def questions(path: Path, most: int = 2_000) -> list[Question]:
    """A question a conversation: its second answer (or its first), and that of the conversation behind it."""
    asked: list[tuple[Messages, str]] = []
    for _, row in sources.rows(str(path)):
        messages = sources.messages(row)
        turn = next((place for place in (TURN, 1) if place < len(messages) and messages[place]["role"] == "assistant"), None)
        if turn is not None:
            asked.append((messages[:turn], messages[turn]["content"]))
        if len(asked) == most:
            break
    behind = [answer for _, answer in [*asked[1:], *asked[:1]]]
    return [Question(prompt, [answer, other]) for (prompt, answer), other in zip(asked, behind, strict=True)]


def pairs(path: Path) -> list[Question]:
    """A question a preference pair: the answer that was chosen is the better one. Raises ValueError for rows that are no pairs."""
    found = []
    for where, row in sources.rows(str(path)):
        if "chosen" not in row:
            raise ValueError(f"{where} must be a pair with 'prompt', 'chosen' and 'rejected', got {', '.join(row)}")
        found.append(Question(row["prompt"], [row[side][-1]["content"] for side in ("chosen", "rejected")]))
    return found


def split_pairs(source: str, train: Path, held: Path) -> tuple[list[Question], list[Question]]:
    """Pairs to train on and pairs held out: of the file `source`, or where it is empty of conversations, with another one's answer."""
    if not source:
        return questions(train), questions(held)
    found = pairs(Path(source))
    return [pair for place, pair in enumerate(found) if place % HELD_OUT], found[::HELD_OUT]


def write_pairs(path: Path, asked: Sequence[Question]) -> Path:
    """Rows of `prompt`, `chosen` and `rejected`, written once."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(_row(question)) + "\n" for question in asked), encoding="utf-8")
        partial.replace(path)
    return path


def _row(question: Question) -> dict[str, Any]:
    sides = zip(("chosen", "rejected"), question.answers, strict=True)
    return {"prompt": question.prompt, **{side: [{"role": "assistant", "content": text}] for side, text in sides}}


def spread(found: Sequence[Question], count: int) -> list[Question]:
    """So many questions, evenly out of those that there are."""
    return list(found[:: max(1, len(found) // count)][:count])
