"""Prepared rows, the order in which a stage trains on them, and batches. Letters: B sequences, T tokens of the longest.

A prepared set is flat files: `tokens` (int32 ids of all documents, one after the other), `targets` (uint8, 1 where a token
is to be learnt), `lengths` (int64, tokens per document); where documents are packed, `packs` (int64, documents per
sequence); where sources are mixed, `mixture` (float64, sequences and weight of each source); where a teacher counts other tokens,
`spans` (int32, of each token the number of its span in its document, or -1) and, of the teacher's tokens, `teacher_tokens`,
`teacher_spans` and `teacher_lengths` likewise.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

IGNORE = -100  # label of a token that is no target, as in Hugging Face
KEPT = ("kept_values", "kept_indices", "kept_tail")  # a teacher's kept logits (llamba.training.stored_logits), a row for each target

SPANS = "spans"

Item = dict[str, NDArray[Any]]
Batch = dict[str, Tensor]  # input_ids, labels, and attention_mask or (packed) position_ids: [B, T]


class Rows(Dataset[Item]):
    """A prepared set, memory-mapped: item i is {"input_ids": [T], "labels": [T]}, and `position_ids` where rows are packed."""

    def __init__(self, folder: Path) -> None:
        self.tokens = np.memmap(folder / "tokens", np.int32, "r")
        self.targets = np.memmap(folder / "targets", np.uint8, "r")
        self.documents = np.fromfile(folder / "lengths", np.int64)
        self.packed = (folder / "packs").exists()
        packs = np.fromfile(folder / "packs", np.int64) if self.packed else np.ones_like(self.documents)
        self.after = np.cumsum(packs)  # documents before the end of each sequence
        self.first = self.after - packs
        mixture = np.fromfile(folder / "mixture") if (folder / "mixture").exists() else np.array([len(packs), 1.0])
        self.mixture: NDArray[np.float64] = mixture.reshape(-1, 2)  # sequences, weight
        ends = np.cumsum(self.documents)
        self.ends = ends[self.after - 1]
        self.lengths = np.diff(self.ends, prepend=0)  # tokens per sequence
        self.theirs = _Theirs(folder) if (folder / SPANS).exists() else None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Item:
        piece = slice(self.ends[index] - self.lengths[index], self.ends[index])
        ids = self.tokens[piece].astype(np.int64)
        item = {"input_ids": ids, "labels": np.where(self.targets[piece] == 1, ids, IGNORE)}
        if self.packed:
            own = self.documents[self.first[index] : self.after[index]]
            item["position_ids"] = np.concatenate([np.arange(length) for length in own])
        if self.theirs is not None:
            item |= self.theirs.item(piece, slice(self.first[index], self.after[index]), self.documents)
        return item


class _Theirs:
    """A prepared set's spans and the tokens of a teacher that counts others."""

    def __init__(self, folder: Path) -> None:
        self.spans, self.tokens, self.their_spans = (
            np.memmap(folder / name, np.int32, "r") for name in (SPANS, "teacher_tokens", "teacher_spans")
        )
        self.lengths = np.fromfile(folder / "teacher_lengths", np.int64)
        self.ends = np.cumsum(self.lengths)

    def item(self, tokens: slice, documents: slice, lengths: NDArray[np.int64]) -> Item:
        """Of a sequence's documents: `spans` [T], numbered through; `teacher_ids`, `teacher_spans` and `teacher_positions` [T']."""
        own, theirs = lengths[documents], self.lengths[documents]
        place = slice(self.ends[documents.stop - 1] - theirs.sum(), self.ends[documents.stop - 1])
        parts = [np.split(each, np.cumsum(sizes)[:-1]) for each, sizes in ((self.spans[tokens], own), (self.their_spans[place], theirs))]
        before = np.cumsum([0, *(part.max(initial=-1) + 1 for part in parts[0])])[:-1]  # spans of earlier documents
        numbered = [np.concatenate([np.where(part < 0, -1, part + add) for part, add in zip(side, before, strict=True)]) for side in parts]
        return {
            SPANS: numbered[0].astype(np.int64), "teacher_spans": numbered[1].astype(np.int64),
            "teacher_ids": self.tokens[place].astype(np.int64),
            "teacher_positions": np.concatenate([np.arange(length) for length in theirs]),
        }  # fmt: skip


class Sequences(Protocol):
    """What can be put in order: rows with their numbers of tokens, and the sequences and weight of each source."""

    lengths: NDArray[np.int64]
    mixture: NDArray[np.float64]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def _passes(rows: int, seed: tuple[int, ...]) -> Iterator[int]:
    """Row numbers, epoch after epoch without end; each epoch a permutation that depends on `seed` and its number alone."""
    number = 0
    while True:
        yield from np.random.default_rng((*seed, number)).permutation(rows).tolist()
        number += 1


def _in_shares(mixture: NDArray[np.float64], lengths: NDArray[np.int64], seed: int) -> Iterator[int]:
    """Rows of several sources, always one of the source whose tokens so far are the furthest behind its weight."""
    counts, weights = mixture[:, 0].astype(int), mixture[:, 1]
    starts, used = np.cumsum(counts) - counts, np.zeros(len(counts))
    streams = [_passes(count, (seed, source)) for source, count in enumerate(counts.tolist())]
    while True:
        source = int(np.argmin(used / weights))
        row = int(starts[source]) + next(streams[source])
        used[source] += lengths[row]
        yield row


class Ordered(Dataset[Any]):
    """The rows of a whole training stage in their order: `steps` times `batch` rows, epoch after epoch.

    The stage's length is `steps`, or as many as reach `tokens`, or `epochs` times the set's rows (of a mixture: its tokens).
    The rows of step k are the same on any number of processes, and after any number of restarts.
    """

    def __init__(self, rows: Sequences, batch: int, seed: int, *, epochs: float, steps: int | None, tokens: int | None) -> None:
        mixed, total = len(rows.mixture) > 1, int(rows.lengths.sum())
        stream = _in_shares(rows.mixture, rows.lengths, seed) if mixed else _passes(len(rows), (seed,))
        if steps is None and (tokens is not None or mixed):
            order = _until(stream, rows.lengths, int(epochs * total) if tokens is None else tokens)
            steps = -(-len(order) // batch) if tokens is not None else max(1, len(order) // batch)
        else:
            steps = max(1, int(len(rows) * epochs // batch)) if steps is None else steps
            order = []
        order += [next(stream) for _ in range(steps * batch - len(order))]
        self.rows, self.batch, self.steps = rows, batch, steps
        self.order = np.array(order[: steps * batch])
        self.seen = np.cumsum(rows.lengths[self.order])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        return self.rows[self.order[index]]

    def tokens_at(self, step: int) -> int:
        """Tokens in the first `step` optimizer steps, over all processes."""
        return int(self.seen[step * self.batch - 1]) if step else 0


def _until(stream: Iterator[int], lengths: NDArray[np.int64], tokens: int) -> list[int]:
    order, seen = [], 0
    while seen < tokens:
        order.append(next(stream))
        seen += int(lengths[order[-1]])
    return order


def collate(rows: list[Item], pad: int) -> Batch:
    """Right-padded input_ids and labels (unshifted; -100 off the targets), each [B, T], and attention_mask.

    Packed rows have `position_ids`, which restart at each document, in place of a mask; their padding is a document
    of its own at the end, without targets. Kept logits follow one another in the order of the targets.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    longest = max(lengths)

    def fill(key: str, value: int) -> Tensor:
        widest = max(len(row[key]) for row in rows)
        return torch.from_numpy(np.stack([np.pad(row[key], (0, widest - len(row[key])), constant_values=value) for row in rows]))

    batch = {"input_ids": fill("input_ids", pad), "labels": fill("labels", IGNORE)}
    batch |= {key: torch.from_numpy(np.concatenate([row[key] for row in rows])) for key in KEPT if key in rows[0]}
    if SPANS in rows[0]:
        batch |= {SPANS: fill(SPANS, -1), "teacher_ids": fill("teacher_ids", 0), "teacher_spans": fill("teacher_spans", -1)}
        batch["teacher_positions"] = _positions([row["teacher_positions"] for row in rows])
    if "position_ids" in rows[0]:
        return batch | {"position_ids": _positions([row["position_ids"] for row in rows])}
    return batch | {"attention_mask": (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()}


def _positions(rows: list[NDArray[Any]]) -> Tensor:
    """Positions [B, T] of packed documents; the padding at the end is one more."""
    longest = max(map(len, rows))
    return torch.from_numpy(np.stack([np.concatenate([row, np.arange(longest - len(row))]) for row in rows]))
