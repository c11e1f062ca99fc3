"""Rows to tokens, once, on disk; and from there to batches.

A prepared set is three flat files: `tokens` (int32 ids of all rows, one after the other), `targets` (uint8, 1 where a
token is to be learnt) and `lengths` (int64, tokens per row). Letters: B rows, T tokens of the longest row.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llamba import sources
from llamba.losses import IGNORE
from llamba.recipe import Data

MANIFEST = "data.json"
TEMPLATES = Path(__file__).parent / "templates"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_AT_ONCE = 256  # rows tokenised in one call

Tokens = tuple[list[int], list[int]]  # ids and 1 for each target, both [T]


@dataclass
class Count:
    """What became of a source's rows: kept, cut at the length limit, skipped for want of words or of targets."""

    source: str
    files: dict[str, str]  # path: sha256
    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    cut: int = 0
    skipped: dict[str, int] = field(default_factory=lambda: {"empty": 0, "no_targets": 0})

    def __str__(self) -> str:
        skips = ", ".join(f"{number} skipped ({why})" for why, number in self.skipped.items() if number)
        head = f"{self.source}: {self.rows} rows, {self.tokens} tokens, {self.target_tokens} of them targets"
        return ", ".join(part for part in (head, f"{self.cut} cut" if self.cut else "", skips) if part)


def _template(data: Data, tokenizer: PreTrainedTokenizerBase, assistant: bool) -> str | None:
    """The chat template to tokenise with, or None where there is none."""
    template = tokenizer.chat_template
    if data.template is not None:
        known = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
        path = TEMPLATES / f"{data.template}.jinja" if data.template in known else Path(data.template)
        if not path.is_file():
            raise ValueError(f"data.template must be a file or one of {known}, got {data.template!r}")
        template = path.read_text(encoding="utf-8")
    if assistant and not (template and _GENERATION.search(template)):
        raise ValueError(
            "targets='assistant' needs a chat template that marks the assistant's words with {% generation %}, and the "
            "tokenizer's does not; set data.template to one that does (e.g. llama3), or use targets='all'"
        )
    return template


class Tokenizer:
    """Rows to (ids, targets), cut at `data.length`. Raises ValueError where the chat template cannot serve."""

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase, targets: str) -> None:
        self.assistant = targets == "assistant"
        self.template = _template(data, tokenizer, self.assistant)
        self.own = data.template is None
        self.inner: Any = tokenizer
        self.length = data.length

    def _chat(self, where: str, messages: list[dict[str, str]]) -> Tokens:
        if self.template is None:
            raise ValueError(f"{where}: messages need a chat template and the tokenizer has none; set data.template")
        apply = self.inner.apply_chat_template
        try:
            found = apply(messages, chat_template=self.template, return_dict=True, return_assistant_tokens_mask=self.assistant)
            if not self.own and self.inner.chat_template and found["input_ids"] != apply(messages, return_dict=True)["input_ids"]:
                raise ValueError(f"{where}: data.template writes this chat differently from the tokenizer's own template")
        except jinja2.TemplateError as error:
            raise ValueError(f"{where}: the chat template refuses these messages: {error}") from None
        self.own = True  # compared once, on the first row
        ids = list(found["input_ids"])
        return ids, list(found["assistant_masks"]) if self.assistant else [1] * len(ids)

    def _text(self, where: str, text: str) -> Tokens:
        if self.assistant:
            raise ValueError(f"{where}: a text row has no assistant's words; use targets='all', or rows with messages")
        ids = list(self.inner(text)["input_ids"])
        end = self.inner.eos_token_id
        ids += [end] if end is not None and ids[-1:] != [end] else []
        return ids, [1] * len(ids)

    def __call__(self, where: str, row: sources.Row) -> Tokens:
        """Ids and targets of a row, whole. The first token is never a target; a doubled BOS is made one."""
        ids, targets = self._text(where, row["text"]) if "text" in row else self._chat(where, row["messages"])
        start = self.inner.bos_token_id
        if start is not None and ids[:2] == [start, start]:
            ids, targets = ids[1:], targets[1:]
        return ids, [0, *targets[1:]]


def _tokenise(source: str, tokenizer: Tokenizer, count: Count) -> Iterator[Tokens]:
    """The rows of a source that have something to learn, cut; the others are counted."""
    for where, row in sources.rows(source):
        if not (row.get("text") or row.get("messages")):
            count.skipped["empty"] += 1
            continue
        ids, targets = tokenizer(where, row)
        count.cut += len(ids) > tokenizer.length
        ids, targets = ids[: tokenizer.length], targets[: tokenizer.length]
        if not any(targets):
            count.skipped["no_targets"] += 1
            continue
        count.rows, count.tokens, count.target_tokens = count.rows + 1, count.tokens + len(ids), count.target_tokens + sum(targets)
        yield ids, targets


def _write(names: list[str], tokenizer: Tokenizer, folder: Path) -> list[Count]:
    folder.mkdir()
    counts = [Count(name, {str(path): sources.sha256(path) for path in sources.files(name)}) for name in names]
    with (folder / "tokens").open("wb") as tokens, (folder / "targets").open("wb") as targets, (folder / "lengths").open("wb") as lengths:
        for count in counts:
            found = _tokenise(count.source, tokenizer, count)
            while block := list(islice(found, _AT_ONCE)):
                np.concatenate([ids for ids, _ in block]).astype(np.int32).tofile(tokens)
                np.concatenate([marks for _, marks in block]).astype(np.uint8).tofile(targets)
                np.array([len(ids) for ids, _ in block], np.int64).tofile(lengths)
    if not any(count.rows for count in counts):
        raise ValueError(f"no row with anything to learn in {', '.join(map(str, counts))}")
    return counts


def _names(given: str | list[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else given or []


def prepare(data: Data, tokenizer: PreTrainedTokenizerBase, targets: str, folder: Path) -> dict[str, Any]:
    """Tokenise `data` into `folder` (`train`, and `eval` where given), which appears whole or not at all.

    Returns the manifest, also written as `data.json`: per source its files' sha256, rows, tokens, target tokens, cut and
    skipped rows. Raises ValueError for broken rows (naming file and line) and where nothing is left to learn from.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    reader = Tokenizer(data, tokenizer, targets)
    manifest: dict[str, Any] = {"length": data.length, "targets": targets}
    for split, given in (("train", data.train), ("eval", data.eval)):
        if given:
            counts = _write(_names(given), reader, partial / split)
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


class Rows(Dataset[dict[str, NDArray[np.int64]]]):
    """A prepared set, memory-mapped: item i is {"input_ids": [T], "labels": [T]}."""

    def __init__(self, folder: Path) -> None:
        self.tokens = np.memmap(folder / "tokens", np.int32, "r")
        self.targets = np.memmap(folder / "targets", np.uint8, "r")
        self.lengths = np.fromfile(folder / "lengths", np.int64)
        self.ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        piece = slice(self.ends[index] - self.lengths[index], self.ends[index])
        ids = self.tokens[piece].astype(np.int64)
        return {"input_ids": ids, "labels": np.where(self.targets[piece] == 1, ids, IGNORE)}


class Ordered(Dataset[dict[str, NDArray[np.int64]]]):
    """The rows of a whole training stage in their order: `steps` times `batch` rows, epoch after epoch.

    Each epoch is a permutation that depends on `seed` and its number alone; steps run on over the end of an epoch. So
    the rows of step k are the same on any number of processes, and after any number of restarts.
    """

    def __init__(self, rows: Rows, batch: int, seed: int, *, epochs: float, steps: int | None, tokens: int | None) -> None:
        wanted = len(rows) * epochs if steps is None else steps * batch
        if tokens is not None:
            wanted = (tokens // int(rows.lengths.sum()) + 1) * len(rows) + batch
        passes = int(wanted // len(rows)) + 1 + batch // len(rows)
        order = np.concatenate([np.random.default_rng((seed, number)).permutation(len(rows)) for number in range(passes)])
        seen = np.cumsum(rows.lengths[order])
        if steps is None:
            steps = max(1, int(wanted // batch)) if tokens is None else int(np.searchsorted(seen, tokens)) // batch + 1
        self.rows, self.batch, self.steps = rows, batch, steps
        self.order, self.seen = order[: steps * batch], seen[: steps * batch]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        return self.rows[self.order[index]]

    def tokens_at(self, step: int) -> int:
        """Tokens in the first `step` optimizer steps, over all processes."""
        return int(self.seen[step * self.batch - 1]) if step else 0


def collate(rows: list[dict[str, NDArray[np.int64]]], pad: int) -> dict[str, Tensor]:
    """Right-padded input_ids, attention_mask and labels (-100 off the targets), each [B, T]. Labels are unshifted."""
    length = max(len(row["input_ids"]) for row in rows)

    def fill(key: str, value: int) -> Tensor:
        padded = [np.pad(row[key], (0, length - len(row[key])), constant_values=value) for row in rows]
        return torch.from_numpy(np.stack(padded))

    counts = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(length) < counts[:, None]).long()
    return {"input_ids": fill("input_ids", pad), "attention_mask": mask, "labels": fill("labels", IGNORE)}


class Prepared(NamedTuple):
    """The prepared data of a run: its folder (one sub-folder per choice of targets) and the seed of the order."""

    folder: Path
    seed: int

    def rows(self, split: str, targets: str) -> Rows | None:
        """A split's rows, None where the recipe names no source for it."""
        folder = self.folder / targets / split
        return Rows(folder) if folder.is_dir() else None
