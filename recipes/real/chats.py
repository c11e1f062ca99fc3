"""The chats of `make real`: from a package or from the user's rows, each twentieth held out before anything is trained."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from llamba.base.packages import carried_file, is_carried
from llamba.data import sources

CHITCHAT = "package:chitchat"
EVERY = 20  # one row of so many is held out
FEWEST = 6  # messages of a conversation that is worth asking the teacher about

Messages = list[dict[str, str]]


def _chitchat() -> Iterator[Messages]:
    """Conversations of two people, in the order of their ids; the one who begins is the user."""
    found: dict[str, Any] = json.loads(carried_file(CHITCHAT).read_text(encoding="utf-8"))
    for key in sorted(found):
        turns = [" ".join(part["text"].strip() for part in turn if part["text"]) for turn in found[key]["messages"]]
        if len(turns) >= FEWEST and all(turns):
            yield [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]


def _conversations(source: str, most: int) -> Iterator[Messages]:
    if is_carried(source):
        yield from islice(_chitchat(), most)
        return
    for _, row in islice(sources.rows(source, streaming=True), most):
        if "text" not in row:
            yield sources.messages(row)


def write_chats(source: str, folder: Path, most: int = 20_000) -> tuple[Path, Path]:
    """Training and held-out rows of `messages`, made once; at most so many rows are read.

    Raises ValueError where too few conversations are found to hold any out.
    """
    train, held = folder / "train.jsonl", folder / "held_out.jsonl"
    if train.exists() and held.exists():
        return train, held
    found = list(_conversations(source, most))
    if len(found) < EVERY:
        raise ValueError(f"data must have at least {EVERY} conversations (rows with 'messages'); {source} has {len(found)}")
    folder.mkdir(parents=True, exist_ok=True)
    for path, rows in (
        (held, [row for place, row in enumerate(found) if place % EVERY == 0]),
        (train, [row for place, row in enumerate(found) if place % EVERY]),
    ):
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
        partial.replace(path)
    return train, held


def write_prompts(train: Path, count: int, turns: int) -> Path:
    """The beginnings of so many training conversations, up to so many of the user's turns, for the teacher to answer; made once."""
    path = train.with_name("prompts.jsonl")
    if not path.exists():
        begun = [sources.messages(row)[: 2 * turns - 1] for _, row in islice(sources.rows(str(train)), count)]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps({"messages": row}) + "\n" for row in begun), encoding="utf-8")
        partial.replace(path)
    return path


def held_out_windows(path: Path, tokenizer: Any, length: int, count: int) -> list[list[int]]:
    """The first `length` tokens of so many held-out chats that are as long, in the tokenizer's own template.

    Raises ValueError where there are fewer than four.
    """
    made: list[list[int]] = []
    for _, row in sources.rows(str(path)):
        ids = tokenizer.apply_chat_template(sources.messages(row), tokenize=True, return_dict=False)
        if len(ids) >= length:
            made.append(ids[:length])
        if len(made) == count:
            break
    if len(made) < 4:
        raise ValueError(f"at least 4 held-out chats of {length} tokens are needed, {path} has {len(made)}; give more or longer chats")
    return made
