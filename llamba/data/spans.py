"""The same words in two tokenizers' tokens: spans of text that begin and end between tokens of both.

A chat's answers are aligned one by one, each behind the prompt as its own model's template writes it; a text is aligned whole. Places are
characters, so a boundary inside a character counts for neither side. Letters: T tokens of a document, T' of the other tokenizer.
"""

import math
import os.path
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from llamba.data import sources
from llamba.data.chat_templates import AUTO, chosen, marks_answers
from llamba.data.tokens import RowTokenizer
from llamba.settings import Data

NONE = -1  # span of a token that is in none

Offsets = Sequence[tuple[int, int]]  # where each token begins and ends in the text


@dataclass(frozen=True)
class Paired:
    """A document's spans: `own` [T] and `other` [T'] number, for each token, the span that it is in (or NONE); `ids` [T'] are the other
    tokenizer's tokens."""

    own: list[int]
    ids: list[int]
    other: list[int]
    most: int = 2**31

    def cut(self, start: int, stop: int) -> "Paired":
        """What of it lies in own tokens start to stop, with no more than `most` of the other's tokens.

        A span with a piece's first token, which nothing comes before, is left out.
        """
        held = self.own[start:stop]
        inside = {number for number in held if number != NONE} - set(self.own[:start]) - set(self.own[stop:])
        places = [index for index, number in enumerate(self.other) if number in inside]
        first = min(places, default=0) if start else 0
        inside -= {self.other[index] for index in places if index >= first + self.most}
        inside -= {held[0], self.other[first]} if held and self.other else set()
        last = max((index for index in places if self.other[index] in inside), default=first)
        other = [number if number in inside else NONE for number in self.other[first : last + 1]]
        return Paired([number if number in inside else NONE for number in held], self.ids[first : last + 1], other)


def boundaries(offsets: Offsets, start: int, length: int) -> dict[int, int]:
    """Where, in text[start : start + length], all tokens before have ended and no later one has begun: place -> the last token before it.

    -1 stands for the place before the first token. Empty tokens (a BOS, an EOS) belong before the text or to what comes behind them.
    """
    later, begins = math.inf, list[float]()  # where the tokens behind each one begin, at the earliest
    for begin, end in reversed(offsets):
        begins.append(later)
        later = min(later, begin) if end > begin else later
    found, reached = {0: -1} if start == 0 else {}, 0
    for index, ((begin, end), behind) in enumerate(zip(offsets, reversed(begins), strict=True)):
        reached = max(reached, end)
        if (end > begin or reached == 0) and start <= reached <= start + length and behind >= reached:
            found[reached - start] = index
    return found


def common_spans(own: Offsets, other: Offsets, segments: Sequence[tuple[int, int, int]]) -> Iterator[tuple[range, range]]:
    """Tokens of both sides that say the same words, shortest spans first to last. Segments: where the words begin on either side, and
    how many characters they have."""
    for mine, theirs, length in segments:
        a, b = boundaries(own, mine, length), boundaries(other, theirs, length)
        for left, right in pairwise(sorted(a.keys() & b.keys())):
            yield range(a[left] + 1, a[right] + 1), range(b[left] + 1, b[right] + 1)


@dataclass(frozen=True)
class _Answer:
    """Where an answer's words begin in the text, and what white space the template leaves before and behind them."""

    begin: int
    before: str
    behind: str


@dataclass(frozen=True)
class _Written:
    """A row as one tokenizer has it: ids [T], where they stand, and its answers by the number of their message."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    answers: dict[int, _Answer]


class Pairing:
    """Rows to spans, between the tokenizer of the data and another. Raises ValueError where one of them does not know where tokens stand,
    or has no template that marks answers."""

    def __init__(self, data: Data, own: Any, other: Any, most: int) -> None:
        self.readers = _Reader(data, own, False), _Reader(replace(data, template=AUTO), other, True)
        self.most = most  # tokens that the other model reads

    def require_chats(self) -> None:
        """Raises ValueError where one of the tokenizers has no chat template that marks answers."""
        for reader in self.readers:
            reader.require_chats()

    def __call__(self, where: str, row: sources.Row) -> Paired:
        """The spans of a row. Raises ValueError, naming the row, where a template refuses it."""
        mine, theirs = (reader(where, row) for reader in self.readers)
        if "text" in row:
            segments = [(0, 0, len(row["text"]))]
        else:
            words = [message["content"].strip() for message in sources.messages(row)]
            both = sorted(mine.answers.keys() & theirs.answers.keys())
            segments = [_segment(mine.answers[place], theirs.answers[place], len(words[place])) for place in both]
        found = list(common_spans(mine.offsets, theirs.offsets, segments))
        if "text" not in row:
            found += _ends(mine, theirs, segments)
        own, other = [NONE] * len(mine.ids), [NONE] * len(theirs.ids)
        found = [pair for pair in found if pair[0].start > 0 and pair[1].start > 0]  # nothing comes before a first token
        for number, (left, right) in enumerate(sorted(found, key=lambda pair: pair[0].start)):
            for tokens, side in ((left, own), (right, other)):
                for index in tokens:
                    side[index] = number
        return Paired(own, theirs.ids, other, self.most)


def _segment(mine: _Answer, theirs: _Answer, words: int) -> tuple[int, int, int]:
    """An answer's words, with the white space around them that both sides have."""
    before = len(os.path.commonprefix([mine.before[::-1], theirs.before[::-1]]))
    behind = len(os.path.commonprefix([mine.behind, theirs.behind]))
    return mine.begin - before, theirs.begin - before, before + words + behind


def _ends(mine: _Written, theirs: _Written, segments: Sequence[tuple[int, int, int]]) -> Iterator[tuple[range, range]]:
    """The token behind each answer, by which a model ends it, where both have one."""
    for left, right, length in segments:
        a, b = (boundaries(side.offsets, start, length).get(length) for side, start in ((mine, left), (theirs, right)))
        if a is not None and b is not None and a + 1 < len(mine.ids) and b + 1 < len(theirs.ids):
            yield range(a + 1, a + 2), range(b + 1, b + 2)


class _Reader:
    """One tokenizer's tokens of a row, and where they stand."""

    def __init__(self, data: Data, tokenizer: Any, foreign: bool) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"distill.match='spans' needs tokenizers that know where their tokens stand (tokenizer.json), and that of "
                f"{tokenizer.name_or_path} does not"
            )
        self.data, self.inner, self.foreign = data, tokenizer, foreign

    def require_chats(self) -> None:
        """Raises ValueError where answers are not marked."""
        assert self._chats.template is not None, "it marks answers"

    @cached_property
    def _chats(self) -> RowTokenizer:
        found = chosen(self.data, self.inner)
        if self.foreign and (found is None or not marks_answers(found.text)):  # no setting reaches it
            raise ValueError(
                f"distill.match='spans' reads chats in the teacher's own template, and {self.inner.name_or_path} has none that marks the "
                "assistant's words: put a chat_template.jinja with {% generation %} and {% endgeneration %} around them into its folder"
            )
        return RowTokenizer(self.data, self.inner, "assistant")

    @cached_property
    def _texts(self) -> RowTokenizer:
        return RowTokenizer(self.data, self.inner, "all")

    def __call__(self, where: str, row: sources.Row) -> _Written:
        if "text" in row:
            ids, _ = self._texts(where, row)
            return _Written(ids, self._placed(row["text"], len(ids), True), {})
        ids, marks = self._chats(where, row)
        messages = sources.messages(row)
        text = self.inner.apply_chat_template(messages, chat_template=self._chats.template, tokenize=False)
        offsets = self._placed(text, len(ids), False)
        return _Written(ids, offsets, _answers(text, offsets, marks, messages))

    def _placed(self, text: str, tokens: int, special: bool) -> list[tuple[int, int]]:
        """Where a row's tokens stand in its text. (A doubled BOS was made one, and an end may have been put behind a text.)"""
        found = list(self.inner(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)["offset_mapping"])
        return found[max(0, len(found) - tokens) :] + [(len(text), len(text))] * (tokens - len(found))


def _answers(text: str, offsets: Offsets, marks: Sequence[int], messages: Sequence[sources.Message]) -> dict[int, _Answer]:
    """Where the words of each answer stand; an answer that the template writes otherwise is left out."""
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    found: dict[int, _Answer] = {}
    for first in (index for index, mark in enumerate(marks) if mark and not marks[index - 1]):
        last = next((index for index in range(first, len(marks)) if not marks[index]), len(marks)) - 1
        answer = text[offsets[first][0] : offsets[last][1]]
        words = answer.lstrip()
        while places and not words.startswith(messages[places[0]]["content"].strip()):
            places.pop(0)
        if places:
            lead, said = len(answer) - len(words), messages[places[0]]["content"].strip()
            rest = words[len(said) :]
            found[places.pop(0)] = _Answer(offsets[first][0] + lead, answer[:lead], rest[: len(rest) - len(rest.lstrip())])
    return found
