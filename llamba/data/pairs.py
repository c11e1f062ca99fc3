"""Preference pairs to tokens, once, on disk; and from there to rows for TRL's DPOTrainer.

A prepared set is flat files: `tokens` (int32: prompt, chosen and rejected answer of each pair, one after the other) and
`lengths` (int64, the three numbers of tokens of each pair); where sources are mixed, `mixture` as in `llamba.data.batches`.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llamba.base.foreign import reading
from llamba.data import sources
from llamba.data.chat_templates import chosen, marks_answers
from llamba.data.tokens import AT_ONCE, MANIFEST, Count, append, names
from llamba.settings import Data


class Pair(NamedTuple):
    """Token ids of a prompt, with the header of the answer, and of two answers, each with its end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class PairTokenizer:
    """Rows to pairs. Prompt and answer are written as one conversation, so nothing stands between them but what the template puts there."""

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase) -> None:
        found = chosen(data, tokenizer)
        self.template = found and found.text
        self.marked = marks_answers(self.template)
        self.inner: Any = tokenizer
        self.checked = False

    def _render(self, where: str, messages: list[sources.Message], header: bool, marks: bool = False) -> Any:
        with reading(f"{where}: the chat template refuses these messages"):
            return self.inner.apply_chat_template(
                messages, chat_template=self.template, return_dict=True, add_generation_prompt=header, return_assistant_tokens_mask=marks
            )

    def _write(self, where: str, messages: list[sources.Message], header: bool = False) -> list[int]:
        """Ids of a conversation. `header`: it ends with the header of an answer; otherwise with its last answer's end token."""
        marks = self.marked and not header
        found = self._render(where, messages, header, marks)
        ids = list(found["input_ids"])
        if marks:  # what follows the last answer (a line's end, say) is not the assistant's
            ids = ids[: len(ids) - list(found["assistant_masks"])[::-1].index(1)]
        start = self.inner.bos_token_id
        return ids[1:] if start is not None and ids[:2] == [start, start] else ids

    def _check(self, where: str, prompt: list[sources.Message]) -> None:
        """Raises ValueError for a template that is missing or does not open an answer."""
        if self.template is None:
            raise ValueError(f"{where}: pairs need a chat template and the tokenizer has none; set data.template")
        if self._render(where, prompt, header=True) == self._render(where, prompt, header=False):
            raise ValueError(
                f"{where}: the chat template must open the assistant's answer where add_generation_prompt is true, and this one does not; "
                "set data.template to one that does"
            )
        self.checked = True

    def __call__(self, where: str, row: sources.Row) -> Pair:
        """A row's ids, whole: the prompt is what both conversations and the opened prompt have in common at their start."""
        if not self.checked:
            self._check(where, row["prompt"])
        opened = self._write(where, row["prompt"], header=True)
        chosen, rejected = (self._write(where, row["prompt"] + row[side]) for side in ("chosen", "rejected"))
        shared = min(_common(opened, chosen), _common(opened, rejected))
        return Pair(opened[:shared], chosen[shared:], rejected[shared:])


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two lists share at their start."""
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _why_skipped(row: sources.Row) -> str | None:
    """What makes a row's text unusable, if anything: an empty side, or two equal answers."""
    texts = ["".join(message["content"] for message in row[side]).strip() for side in ("prompt", "chosen", "rejected")]
    if not all(texts):
        return "empty"
    return "identical" if texts[1] == texts[2] else None


def _pairs(data: Data, tokenizer: PairTokenizer, count: Count) -> Iterator[Pair]:
    """The usable pairs of a source; the others are counted."""
    for where, row in sources.rows(count.source, part=data.part):
        if "chosen" not in row:
            raise ValueError(f"{where}: needed 'prompt', 'chosen' and 'rejected', got {sorted(row)}")
        why = _why_skipped(row)
        pair = Pair([], [], []) if why else tokenizer(where, row)
        if not why and len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) > data.length:
            why = "too_long"
        if why:
            count.skipped[why] += 1
            continue
        answers = len(pair.chosen) + len(pair.rejected)
        count.rows, count.sequences, count.target_tokens = count.rows + 1, count.sequences + 1, count.target_tokens + answers
        count.tokens += 2 * len(pair.prompt) + answers
        yield pair


def _count(source: str) -> Count:
    files = {str(path): sources.sha256(path) for path in sources.files(source)}
    return Count(source, files, sources.licence(source), skipped={"empty": 0, "identical": 0, "too_long": 0})


def _write(data: Data, given: list[str], tokenizer: PairTokenizer, folder: Path) -> list[Count]:
    folder.mkdir()
    counts, weights = [_count(source) for source in given], data.weights
    for count, share in zip(counts, weights or [1.0] * len(given), strict=True):
        found = _pairs(data, tokenizer, count)
        while block := list(islice(found, AT_ONCE)):
            append(folder, "tokens", np.concatenate([side for pair in block for side in pair]), np.int32)
            append(folder, "lengths", [len(side) for pair in block for side in pair], np.int64)
        if weights:
            append(folder, "mixture", [count.sequences, share], np.float64)
    if not all(count.rows for count in counts) if weights else not any(count.rows for count in counts):
        raise ValueError(f"no pair to learn from in {', '.join(map(str, counts))}")
    return counts


def require_whole(data: Data) -> None:
    """Raises ValueError for data that are packed or streamed, which pairs cannot be."""
    if data.packing or data.streaming:
        raise ValueError("data.packing and data.streaming do not go with preference pairs; give the stage data of its own without them")


def tokenize_pairs(data: Data, tokenizer: PreTrainedTokenizerBase, targets: str, folder: Path) -> dict[str, Any]:
    """Tokenise the pairs of `data` into `folder` (`train`, and `eval` where given), which appears whole or not at all.

    Pairs that do not fit into `data.length` with both answers whole are counted and left out, and so are pairs with an
    empty or the same answer. Returns the manifest, also written as `data.json`. Raises ValueError for rows without
    both answers (naming file and line), a template that does not open an answer, and where no pair is left.
    """
    assert targets == "pairs", targets
    require_whole(data)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    reader = PairTokenizer(data, tokenizer)
    manifest: dict[str, Any] = {"length": data.length, "targets": targets}
    for split, given in (("train", data.train), ("eval", data.eval)):
        if given:
            own = data if split == "train" else replace(data, part=None, weights=None)
            counts = _write(own, names(given), reader, partial / split)
            print("\n".join(f"{split} data {count}" for count in counts), flush=True)
            manifest[split] = [vars(count) for count in counts]
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(partial, folder)
    return manifest


class Pairs(Dataset[dict[str, Any]]):
    """A prepared set, memory-mapped: item i has `prompt_ids`, `chosen_ids` and `rejected_ids`, lists of token ids.

    With `reference` ([pairs, 2] log-probabilities of chosen and rejected) also `ref_chosen_logps` and `ref_rejected_logps`.
    """

    def __init__(self, folder: Path) -> None:
        self.tokens = np.memmap(folder / "tokens", np.int32, "r")
        self.sides = np.fromfile(folder / "lengths", np.int64).reshape(-1, 3)
        self.ends = np.cumsum(self.sides).reshape(-1, 3)
        self.lengths = self.sides @ np.array([2, 1, 1])  # tokens of both sequences
        mixture = np.fromfile(folder / "mixture") if (folder / "mixture").exists() else np.array([len(self.sides), 1.0])
        self.mixture = mixture.reshape(-1, 2)
        self.reference: Any = None

    def __len__(self) -> int:
        return len(self.sides)

    def __getitem__(self, index: int) -> dict[str, Any]:
        parts = zip(("prompt_ids", "chosen_ids", "rejected_ids"), self.ends[index], self.sides[index], strict=True)
        item: dict[str, Any] = {name: self.tokens[end - length : end].tolist() for name, end, length in parts}
        if self.reference is None:
            return item
        chosen, rejected = self.reference[index].tolist()
        return item | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
