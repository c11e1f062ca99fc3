"""Rows to tokens, once, on disk, in the files that `llamba.data.batches` describes. Letter: T tokens of a document."""

import bisect
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from llamba.base.foreign import reading
from llamba.data import sources
from llamba.data.batches import SPANS, Rows
from llamba.data.chat_templates import AUTO, chosen, require_marks
from llamba.settings import Data

MANIFEST = "data.json"
AT_ONCE = 256  # rows tokenised in one call

_WHY = {"no_targets": "without words to learn", "too_long": "whose first answer begins beyond the limit (data.length)", "empty": "empty"}

Tokens = tuple[list[int], list[int]]  # ids and 1 for each target, both [T]


class Spans(Protocol):
    """A document's spans, shared with another tokenizer's tokens: see `llamba.data.spans.Paired`."""

    @property
    def own(self) -> list[int]:
        """The span of each own token."""

    @property
    def ids(self) -> list[int]:
        """The other tokens."""

    @property
    def other(self) -> list[int]:
        """The span of each of them."""

    def cut(self, start: int, stop: int) -> "Spans":
        """What of it lies in own tokens start to stop."""


class Document(NamedTuple):
    """What is learnt from: ids and targets [T], and spans where a teacher counts other tokens."""

    ids: list[int]
    targets: list[int]
    spans: Spans | None


Pair = Callable[[str, sources.Row], Spans]  # a row's spans


@dataclass
class Count:
    """What became of a source's rows: kept (some of them cut at the length limit), or left out for want of words or of targets.

    `next`: the row at which reading goes on where a limit ended it, and where it began; 0 for a source that is read whole.
    """

    source: str
    files: dict[str, str]  # path: sha256
    licence: str | None = None
    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    target_tokens: int = 0
    cut: int = 0
    skipped: dict[str, int] = field(default_factory=lambda: {"empty": 0, "no_targets": 0})
    next: int = 0

    def __str__(self) -> str:
        left_out = ", ".join(f"{number} {_WHY.get(why, why)}" for why, number in self.skipped.items() if number)
        rows = f"{self.rows} of {self.rows + sum(self.skipped.values())} rows" if left_out else f"{self.rows} rows"
        cut = f" ({self.cut} of them cut at the limit)" if self.cut else ""
        packed = f" in {self.sequences} sequences" if self.sequences != self.rows else ""
        head = f"{self.source}: {rows}{cut}{packed}, {self.tokens} tokens, {self.target_tokens} of them targets"
        return head + (f"; left out: {left_out}" if left_out else "")


class RowTokenizer:
    """Rows to (ids, targets), cut at `data.length`. Raises ValueError where the chat template cannot serve."""

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase, targets: str) -> None:
        self.assistant, self.whole = targets in ("answers", "assistant"), targets == "answers"
        found = chosen(data, tokenizer)
        found = require_marks(found) if self.assistant else found
        self.template, self.name, self.auto = found and found.text, found and found.name, data.template == AUTO
        self.own = data.template is None or found is None or found.text == tokenizer.chat_template
        self.inner: Any = tokenizer
        self.length = data.length

    def _chat(self, where: str, messages: list[dict[str, str]]) -> Tokens:
        if self.template is None:
            raise ValueError(f"{where}: messages need a chat template and the tokenizer has none; set data.template")
        apply = partial(self.inner.apply_chat_template, tokenizer_kwargs={"verbose": False})  # rows are cut here
        with reading(f"{where}: the chat template refuses these messages"):
            found = apply(messages, chat_template=self.template, return_dict=True, return_assistant_tokens_mask=self.assistant)
            alike = self.own or not self.inner.chat_template or found["input_ids"] == apply(messages, return_dict=True)["input_ids"]
        if not alike and self.auto:
            raise ValueError(
                f"{where}: the tokenizer's own template writes this chat differently from {self.name!r}, which marks answers and was taken "
                "for it: set data.template to a copy of it with {% generation %} and {% endgeneration %} around the answers"
            )
        if not alike:
            raise ValueError(
                f"{where}: data.template writes this chat differently from the tokenizer's own template; data.template=auto takes what fits"
            )
        self.own = True  # compared once, on the first row
        ids = list(found["input_ids"])
        return ids, list(found["assistant_masks"]) if self.assistant else [1] * len(ids)

    def _text(self, where: str, text: str) -> Tokens:
        if self.assistant:
            raise ValueError(f"{where}: a text row has no assistant's words; use targets='all', or rows with messages")
        with reading(f"{where}: the tokenizer refuses this text"):
            ids = list(self.inner(text)["input_ids"])
        end = self.inner.eos_token_id
        ids += [end] if end is not None and ids[-1:] != [end] else []
        return ids, [1] * len(ids)

    def __call__(self, where: str, row: sources.Row) -> Tokens:
        """Ids and targets of a row, whole. The first token is never a target; a doubled BOS is made one."""
        ids, targets = self._text(where, row["text"]) if "text" in row else self._chat(where, sources.messages(row))
        start = self.inner.bos_token_id
        if start is not None and ids[:2] == [start, start]:
            ids, targets = ids[1:], targets[1:]
        return ids, [0, *targets[1:]]


def _pieces(tokens: Tokens, length: int) -> Iterator[Tokens]:
    """A long text in pieces of `length`; a piece's first token has nothing before it, so it is no target."""
    ids, targets = tokens
    for start in range(0, len(ids), length):
        yield ids[start : start + length], [0, *targets[start + 1 : start + length]]


def _whole_answers(tokens: Tokens, length: int) -> Tokens:
    """A conversation up to the end of the last answer that fits into `length` tokens; nothing where none does."""
    ids, targets = tokens
    if len(ids) > length:
        ends = [index + 1 for index in range(length) if targets[index] and not targets[index + 1]]
        return ids[: max(ends, default=0)], targets[: max(ends, default=0)]
    return tokens


def _is_empty(row: sources.Row, whole: bool) -> bool:
    """Whether a row has no words, or (where answers count whole) an answer without words."""
    if not any(row.values()):
        return True
    answers = (
        [message["content"] for message in sources.messages(row) if message["role"] == "assistant"] if whole and "text" not in row else []
    )
    return not all(answer.strip() for answer in answers)


def _rows(data: Data, count: Count) -> Iterator[tuple[str, sources.Row]]:
    """The rows of a source, once each, from row `count.next` on and around the end; `next` counts along, past rows that were used."""
    first = count.next
    for start, stop in ((first, None), (0, first)):
        count.next = start
        for row in sources.rows(count.source, data.streaming, data.part, start, stop):
            yield row
            count.next += 1


def _tokenise(data: Data, tokenizer: RowTokenizer, count: Count, limit: float, pair: Pair | None) -> Iterator[Document]:
    """The documents of a source that have something to learn, cut or split, up to `limit` tokens; the others are counted."""
    for where, row in _rows(data, count):
        if count.tokens >= limit:
            return
        if _is_empty(row, tokenizer.whole):
            count.skipped["empty"] += 1
            continue
        whole = tokenizer(where, row)
        split = data.packing and "text" in row
        kept = _whole_answers(whole, data.length) if tokenizer.whole else whole
        numbered = enumerate(islice(_pieces(kept, data.length), None if split else 1))
        pieces = [(number * data.length, piece) for number, piece in numbered if any(piece[1])]
        if not pieces:
            why = "too_long" if any(whole[1]) else "no_targets"
            count.skipped[why] = count.skipped.get(why, 0) + 1
        count.rows += bool(pieces)
        count.cut += bool(pieces) and len(whole[0]) > data.length and not split
        spans = pair(where, row) if pair and pieces else None
        for start, (ids, targets) in pieces:
            count.tokens, count.target_tokens = count.tokens + len(ids), count.target_tokens + sum(targets)
            yield Document(ids, targets, spans and spans.cut(start, start + len(ids)))


def pack(lengths: list[int], room: int) -> list[list[int]]:
    """Indices of documents grouped into sequences of at most `room` tokens: each, longest first, goes where it fits best."""
    spaces: list[tuple[int, int]] = []  # (room left, sequence), sorted
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect.bisect_left(spaces, (lengths[index], -1))
        if place == len(spaces):
            packs.append([])
        left, number = spaces.pop(place) if place < len(spaces) else (room, len(packs) - 1)
        packs[number].append(index)
        bisect.insort(spaces, (left - lengths[index], number))
    return packs


def append(folder: Path, name: str, values: Any, kind: type[np.generic]) -> None:
    with (folder / name).open("ab") as file:
        np.asarray(values, kind).tofile(file)


def _write_source(data: Data, tokenizer: RowTokenizer, count: Count, limit: float, folder: Path, pair: Pair | None) -> None:
    found = _tokenise(data, tokenizer, count, limit, pair)
    while block := list(islice(found, AT_ONCE)):
        packs = pack([len(one.ids) for one in block], data.length) if data.packing else [[index] for index in range(len(block))]
        documents = [block[index] for pack in packs for index in pack]
        append(folder, "tokens", np.concatenate([one.ids for one in documents]), np.int32)
        append(folder, "targets", np.concatenate([one.targets for one in documents]), np.uint8)
        append(folder, "lengths", [len(one.ids) for one in documents], np.int64)
        spans = [one.spans for one in documents if one.spans is not None]
        if spans:
            append(folder, SPANS, np.concatenate([one.own for one in spans]), np.int32)
            append(folder, "teacher_tokens", np.concatenate([one.ids for one in spans]), np.int32)
            append(folder, "teacher_spans", np.concatenate([one.other for one in spans]), np.int32)
            append(folder, "teacher_lengths", [len(one.ids) for one in spans], np.int64)
        if data.packing:
            append(folder, "packs", [len(pack) for pack in packs], np.int64)
        count.sequences += len(packs)


def source_key(source: str, part: tuple[int, int] | None) -> str:
    """The name of a source, or of a part of it, as something that is read from its start to its end."""
    return source if part is None else f"{source} part {part[0]} of {part[1]}"


def _write(
    data: Data, names: list[str], weights: list[float] | None, tokenizer: RowTokenizer, limit: float, folder: Path, starts: dict[str, int],
    pair: Pair | None,
) -> list[Count]:  # fmt: skip
    folder.mkdir()
    counts = [Count(name, {str(path): sources.sha256(path) for path in sources.files(name)}, sources.licence(name)) for name in names]
    for count in counts:
        count.next = starts.get(source_key(count.source, data.part), 0)
    for count, share in zip(counts, weights or [1.0] * len(names), strict=True):
        _write_source(data, tokenizer, count, limit * share / sum(weights or [1.0]), folder, pair)
        if weights and not count.rows:
            raise ValueError(f"a mixture needs rows with something to learn in every source, got {count}")
        if weights:
            append(folder, "mixture", [count.sequences, share], np.float64)
    if not any(count.rows for count in counts):
        raise ValueError(f"no row with anything to learn in {', '.join(map(str, counts))}")
    return counts


def names(given: str | list[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else given or []


def tokenize(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    targets: str,
    folder: Path,
    limit: int | None = None,
    starts: dict[str, int] | None = None,
    pair: Pair | None = None,
) -> dict[str, Any]:
    """Tokenise `data` into `folder` (`train`, and `eval` where given), which appears whole or not at all.

    `limit`: training tokens after which reading stops; `starts`: the row at which reading of a `source_key` begins; `pair`: the spans that
    each row shares with another tokenizer's tokens (`llamba.data.spans.Pairing`). Returns the
    manifest, also written as `data.json`: per source its files' sha256, licence, rows, tokens, target tokens, cut and
    skipped rows. Raises ValueError for broken rows (naming file and line) and where nothing is left to learn from.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    reader = RowTokenizer(data, tokenizer, targets)
    manifest: dict[str, Any] = {"length": data.length, "packing": data.packing, "targets": targets}
    for split, given in (("train", data.train), ("eval", data.eval)):
        if given:
            train = split == "train"
            counts = _write(
                data if train else replace(data, part=None),
                names(given),
                data.weights if train else None,
                reader,
                limit if train and limit else float("inf"),
                partial / split,
                (starts or {}) if train else {},
                pair,
            )
            print("\n".join(f"{split} data {count}" for count in counts), flush=True)
            manifest[split] = [vars(count) for count in counts]
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(partial, folder)
    return manifest


def check_unchanged(manifest: dict[str, Any]) -> None:
    """Raises ValueError if a local file is not the one that was tokenised."""
    for count in manifest["train"] + manifest.get("eval", []):
        for name, digest in count["files"].items():
            if not Path(name).is_file() or sources.sha256(Path(name)) != digest:
                raise ValueError(f"data file {name} is not what it was when this run began; restore it, or choose another output folder")


class StageData(NamedTuple):
    """A stage's data: what the recipe says, with every source a file, folder or hub set; the seed of the order; and the
    folder of its tokenised rows, where the stage trains on tokens."""

    config: Data
    seed: int
    folder: Path | None = None

    def rows(self, split: str) -> Rows | None:
        """A split's tokenised rows, None where the recipe names no source for it."""
        assert self.folder is not None, "this stage's rows are not tokenised"
        return Rows(self.folder / split) if (self.folder / split).is_dir() else None


def stopped(data: Data, folder: Path) -> dict[str, int]:
    """The row at which the next stage goes on in each source of a streamed set; nothing for data that is read whole."""
    if not data.streaming:
        return {}
    return {source_key(count["source"], data.part): count["next"] for count in json.loads((folder / MANIFEST).read_text())["train"]}


def set_name(data: Data, targets: str, limit: int | None, starts: dict[str, int], teacher: str | None = None) -> str:
    """The folder name of a tokenised set: its targets and a digest of all that it was made from. `teacher`: whose tokens it is paired
    with."""
    made_from = json.dumps([asdict(data), targets, limit, *([starts] if starts else []), *([teacher] if teacher else [])])
    return f"{targets}-{hashlib.sha256(made_from.encode()).hexdigest()[:8]}"
