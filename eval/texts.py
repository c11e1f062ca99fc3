"""What perplexity is measured on: windows of a plain text, or conversations of which the answers count. Letter: T tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from llamba.data import sources
from llamba.data.chat_templates import marks_answers


@dataclass(frozen=True)
class Text:
    """Ids of a text's tokens [T], and the positions, from 1 on, of those that are predicted and count."""

    ids: list[int]
    targets: list[int]


def windows_of(tokenizer: Any, text: str, length: int, most: int | None) -> list[list[int]]:
    """Full windows of `length` targets, each after BOS. Raises ValueError for a text shorter than one window."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = length if bos else length + 1
    made = [bos + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)][:most]
    if not made:
        raise ValueError(
            f"the text must have at least {step} tokens for one window, it has {len(ids)}; give more text or a smaller --length"
        )
    return made


def plain(tokenizer: Any, path: Path, length: int, most: int | None) -> list[Text]:
    """A file's windows, all of whose tokens count. Raises ValueError for a file that is none, no UTF-8, or too short."""
    if not path.is_file():
        raise ValueError(f"--text must be a file of plain text, got {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text must be in UTF-8, and {path} is not: {error}") from error
    return [Text(ids, list(range(1, len(ids)))) for ids in windows_of(tokenizer, text, length, most)]


def chats(tokenizer: Any, source: str, length: int, most: int | None) -> tuple[list[Text], str]:
    """Conversations in the checkpoint's template, cut after the last answer that fits; and a line on what was read, cut and left out.

    Raises ValueError for a tokenizer without a template, and where no row has an answer that fits.
    """
    if tokenizer.chat_template is None:
        raise ValueError("--chat needs a tokenizer with a chat template, and this one has none; use --text")
    made, read, cut = list[Text](), 0, 0
    for where, row in sources.rows(source):
        if most is not None and len(made) == most:
            break
        read += 1
        if "text" in row:
            raise ValueError(f"{where}: --chat needs conversations, and this row is a text; use --text with a file of plain text")
        whole = _answers(where, tokenizer, sources.messages(row))
        fits = _whole_answers(whole, length)
        cut += fits is not None and len(fits.ids) < len(whole.ids)
        made += [] if fits is None else [fits]
    if not made:
        raise ValueError(f"--chat must hold conversations with an answer within --length {length}; of {read} rows none has one")
    left = read - len(made)
    return made, f"{len(made)} chats of {read} rows, {cut} of them cut after a whole answer; {left} without an answer in {length} tokens"


def _whole_answers(text: Text, length: int) -> Text | None:
    """A conversation up to the end of the last answer within `length` tokens; None where none is."""
    counted = set(text.targets)
    ends = [place + 1 for place in text.targets if place < length and place + 1 not in counted]
    if len(text.ids) <= length:
        return text if text.targets else None
    return Text(text.ids[: ends[-1]], [place for place in text.targets if place < ends[-1]]) if ends else None


def _answers(where: str, tokenizer: Any, messages: list[dict[str, str]]) -> Text:
    """A conversation's tokens, of which the assistant's count: where the template marks them, or else what each answer adds to the text."""
    try:
        if marks_answers(tokenizer.chat_template):
            found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return Text(list(found["input_ids"]), [i for i, counts in enumerate(found["assistant_masks"]) if counts and i])
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = list(_spans(tokenizer, messages, text))
    except jinja2.TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses these messages: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(
            "--chat needs a template that marks answers with {% generation %}, or a tokenizer that knows where its tokens stand"
        )
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = [any(start <= left < right <= end for start, end in spans) for left, right in made["offset_mapping"]]
    return Text(made["input_ids"], [i for i, counts in enumerate(inside) if counts and i])


def _spans(tokenizer: Any, messages: list[dict[str, str]], text: str) -> Iterator[tuple[int, int]]:
    """Where each answer stands in the text, with the token that ends it. One that the template writes otherwise later on is left out."""
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number:
            before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            upto = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
            if text.startswith(upto) and upto.startswith(before):
                yield len(before), len(before) + len(upto[len(before) :].rstrip())
