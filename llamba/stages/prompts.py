"""Rows to the prompts that a teacher answers: what is asked, what is skipped, and batches of like length."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from llamba.base.foreign import reading
from llamba.data import sources
from llamba.data.chat_templates import chosen
from llamba.settings import Data, PseudoLabel

WINDOW = 64  # batches that are sorted together

Messages = list[sources.Message]


@dataclass(frozen=True)
class Prompt:
    """What is asked: one element of `turns` after the other, each up to and with a user's turn. `length`: tokens of the first."""

    index: int
    source: str
    turns: list[Messages]
    length: int


def source_names(data: Data) -> list[str]:
    return [data.train] if isinstance(data.train, str) else data.train


class Reader:
    """Rows to prompts of at most `room` tokens. `skipped` counts the rows that are none, by reason."""

    def __init__(self, stage: PseudoLabel, data: Data, tokenizer: Any, room: int) -> None:
        self.stage, self.data, self.tokenizer, self.room = stage, data, tokenizer, room
        found = chosen(data, tokenizer)
        self.template = found and found.text
        if self.template is None:
            raise ValueError("pseudo_label needs a chat template and the teacher's tokenizer has none; set data.template")
        self.skipped = {"no_prompt": 0, "empty": 0, "too_long": 0}

    def ids(self, where: str, messages: Messages) -> list[int]:
        """The conversation as the teacher reads it before it answers. Raises ValueError where the template refuses it."""
        with reading(f"{where}: the chat template refuses these messages"):
            found = self.tokenizer.apply_chat_template(messages, chat_template=self.template, add_generation_prompt=True, return_dict=True)
        return list(found["input_ids"])

    def _turns(self, messages: Messages) -> list[Messages]:
        users = [place for place, message in enumerate(messages) if message["role"] == "user"]
        if not users or self.stage.turns == "last":
            return [messages[: users[-1] + 1]] if users else []
        starts = [0, *(place + 1 for place in users[:-1])]
        spans = [messages[start : end + 1] for start, end in zip(starts, users, strict=True)]
        return [[message for message in span if message["role"] != "assistant"] for span in spans]

    def _prompt(self, index: int, where: str, row: sources.Row) -> Prompt | str:
        """The prompt, or why the row is none."""
        if "text" in row:
            raise ValueError(f"{where}: pseudo_label needs rows with messages or a prompt, got a text; set stages.pseudo_label.data.train")
        turns = self._turns(sources.messages(row))
        if not turns:
            return "no_prompt"
        if not all(turn[-1]["content"].strip() for turn in turns):
            return "empty"
        length = len(self.ids(where, turns[0]))
        return "too_long" if length > self.room else Prompt(index, where, turns, length)

    def __iter__(self) -> Iterator[Prompt]:
        """Raises ValueError that names the place for a row of text, and for one that the template refuses."""
        every = (row for name in source_names(self.data) for row in sources.rows(name, self.data.streaming, self.data.part))
        for index, (where, row) in enumerate(islice(every, self.stage.rows)):
            prompt = self._prompt(index, where, row)
            if isinstance(prompt, str):
                self.skipped[prompt] += 1
            else:
                yield prompt


def batches(prompts: Iterator[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Batches of prompts of like length, the longest of a window first."""
    while window := list(islice(prompts, WINDOW * size)):
        window.sort(key=lambda prompt: (-prompt.length, prompt.index))
        for start in range(0, len(window), size):
            yield window[start : start + size]
