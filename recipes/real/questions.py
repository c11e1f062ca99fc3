"""Questions with two answers of which the first is better, out of conversations; and such pairs as rows to train on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamba.data import sources

Messages = list[dict[str, str]]
TURN = 3  # the message of a conversation that is asked for, where there are so many


@dataclass(frozen=True)
class Question:
    """A conversation, and answers to it of which the first is the better one."""

    prompt: Messages
    answers: list[str]


def questions(path: Path, most: int) -> list[Question]:
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
