"""A teacher's logits, made once: at every target its k likeliest next tokens, and the mass of all others, in shards.

    folder/logits.json         what they are and of what
    folder/00000.safetensors   values [m, k] (log probability, fp32), indices [m, k] (int32), tail [m] (log of the mass of
                               all other tokens, fp32), for the m targets of some rows, in their order

A shard appears whole or not at all, and depends on its own rows alone: one that is missing or cut short is made again,
with the same bytes. Letters: m targets of a shard, k kept tokens, B rows, T tokens, D' width of the teacher, V vocabulary.
"""

import functools
import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from llamba.base.devices import processes
from llamba.data.batches import KEPT, Item, Rows, collate
from llamba.data.sources import sha256
from llamba.models.documents import attend_by_document, by_document
from llamba.models.loading import load_config
from llamba.settings import Distill
from llamba.training.losses import IGNORE, TopK
from llamba.training.trainer import model_inputs

_SHARD_BYTES = 2**28
_LOGITS_AT_ONCE = 2**26  # elements of one [c, V] block
_ENDS = 2**20  # bytes at both ends of a weight file that tell it from another


def _weights(teacher: str) -> str:
    """What tells a teacher's weights from others': the hub's commit, or sizes and ends of a folder's files."""
    if not Path(teacher).is_dir():
        return f"{teacher} {getattr(load_config(teacher), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(teacher).iterdir() if path.name == "config.json" or path.suffix in (".safetensors", ".bin")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, path.stat().st_size - _ENDS))
            digest.update(file.read())
    return digest.hexdigest()


def describe(stage: Distill, teacher: str, rows: Path) -> dict[str, Any]:
    """What a set of kept logits depends on: the teacher, the tokenised rows in the folder `rows`, and how the teacher runs."""
    files = {name: sha256(rows / name) for name in ("tokens", "targets", "lengths", "packs") if (rows / name).exists()}
    how = {"k": stage.offline, "temperature": stage.temperature, "precision": stage.precision, "teacher_bits": stage.teacher_bits}
    return {"weights": _weights(teacher), "rows": files, **how}


class Shards:
    """The shards of a set of rows: which rows each holds, and where in it."""

    def __init__(self, rows: Rows, k: int, folder: Path) -> None:
        starts = rows.ends - rows.lengths
        self.targets = np.add.reduceat(rows.targets, starts, dtype=np.int64)  # of each row
        self.ends = np.cumsum(self.targets)
        self.k, self.folder = k, folder
        self._opened = functools.lru_cache(64)(lambda number: safe_open(self.path(number), "np"))
        self.each = max(1, int(_SHARD_BYTES / (8 * k + 4) / self.targets.mean()))  # rows in a shard

    def __len__(self) -> int:
        return -(-len(self.targets) // self.each)

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{number:05}.safetensors"

    def rows(self, number: int) -> range:
        """The rows of a shard."""
        return range(number * self.each, min((number + 1) * self.each, len(self.targets)))

    def fault(self, number: int) -> str | None:
        """Why a shard must be made: None for a whole one."""
        path = self.path(number)
        if not path.exists():
            return "was interrupted" if _partial(path).exists() else "is missing"
        try:
            with safe_open(path, "np") as file:
                found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        except SafetensorError:
            return "is cut short or broken"
        m = int(self.targets[self.rows(number)].sum())
        return None if found == {"values": (m, self.k), "indices": (m, self.k), "tail": (m,)} else "holds something else"

    def read(self, row: int) -> Item:
        """The kept logits of a row's targets, under the names that batches use."""
        number = row // self.each
        before = self.ends[number * self.each] - self.targets[number * self.each]
        piece = slice(int(self.ends[row] - self.targets[row] - before), int(self.ends[row] - before))
        file = self._opened(number)
        return {name: file.get_slice(key)[piece] for name, key in zip(KEPT, ("values", "indices", "tail"), strict=True)}


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


class RowsWithLogits(Rows):
    """Prepared rows together with a teacher's kept logits of their targets."""

    def __init__(self, folder: Path, k: int, logits: Path) -> None:
        super().__init__(folder)
        self.shards = Shards(self, k, logits)

    def __getitem__(self, index: int) -> Item:
        return super().__getitem__(index) | self.shards.read(index)


def _hidden(teacher: PreTrainedModel, rows: list[Item]) -> Tensor:
    """Last hidden states at the positions before targets, [m, D']."""
    batch = {key: value.to(teacher.device) for key, value in collate(rows, 0).items()}
    hidden: Tensor = teacher.base_model(**model_inputs(batch), **by_document(teacher, batch), use_cache=False).last_hidden_state
    return hidden[:, :-1][batch["labels"][:, 1:].to(hidden.device) != IGNORE]


def _top_k(teacher: PreTrainedModel, rows: list[Item], k: int, temperature: float) -> TopK:
    """The kept logits of some rows' targets, in blocks, on the CPU. Raises ValueError where a logit is not finite."""
    head: Any = teacher.get_output_embeddings()
    blocks = _hidden(teacher, rows).split(max(1, _LOGITS_AT_ONCE // teacher.config.vocab_size))
    parts = [TopK.of(head(block).float(), k, temperature) for block in blocks]
    kept = TopK(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
    if not torch.isfinite(kept.values).all():
        raise ValueError(f"the teacher's logits must be finite, got NaN or infinity in {teacher.config.name_or_path}; try precision=fp32")
    return kept


@torch.no_grad()
def _make(stage: Distill, teacher: PreTrainedModel, rows: Rows, shards: Shards, number: int) -> None:
    """Write one shard."""
    wanted = shards.rows(number)
    groups = [wanted[start : start + stage.micro_batch] for start in range(0, len(wanted), stage.micro_batch)]
    with torch.autocast(teacher.device.type, torch.bfloat16, enabled=stage.precision == "bf16"):
        found = [_top_k(teacher, [rows[index] for index in group], shards.k, stage.temperature) for group in groups]
    values, indices, tail = (torch.cat(part) for part in zip(*found, strict=True))
    path = shards.path(number)
    save_file({"values": values, "indices": indices.int(), "tail": tail}, _partial(path))
    os.replace(_partial(path), path)


def _progress(numbers: list[int], shards: Shards) -> Iterator[int]:
    """The numbers one by one, with a line on each that is done."""
    started, tokens = time.monotonic(), 0
    for count, number in enumerate(numbers, 1):
        yield number
        tokens += int(shards.targets[shards.rows(number)].sum())
        rate = tokens / (time.monotonic() - started)
        print(f"teacher's logits: {count} of {len(numbers)} shards, {tokens} targets, {rate:.0f} a second", flush=True)


def store_logits(stage: Distill, rows: Path, teacher: str, load: Callable[[], PreTrainedModel], folder: Path) -> RowsWithLogits:
    """The rows in `rows` with the kept logits of the model `teacher`, which are made where they are not yet below `folder`.

    `load` loads the teacher, and is called only where a shard is missing or broken. Under a launcher every process calls
    this and makes its part. Raises ValueError for more kept tokens than the vocabulary has, and for logits that are not finite.
    """
    assert stage.offline is not None
    vocabulary = load_config(teacher).vocab_size
    if stage.offline > vocabulary:
        raise ValueError(f"distill.offline must be at most the vocabulary's {vocabulary} tokens, got {stage.offline}")
    what = describe(stage, teacher, rows)
    folder = folder / hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    if _rank() == 0:
        (folder / "logits.json").write_text(json.dumps({"teacher": teacher} | what, indent=2) + "\n")
    plain = Rows(rows)
    shards = Shards(plain, stage.offline, folder)
    _fill(stage, plain, shards, load)
    while any(shards.fault(number) for number in range(len(shards))):  # those of other processes
        time.sleep(0.5)
    return RowsWithLogits(rows, stage.offline, folder)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _fill(stage: Distill, rows: Rows, shards: Shards, load: Callable[[], PreTrainedModel]) -> None:
    """Make those of this process's shards that are missing or broken; broken ones are reported."""
    faults = {number: shards.fault(number) for number in range(_rank(), len(shards), processes())}
    wanted = [number for number, fault in faults.items() if fault]
    for number in wanted:
        if faults[number] != "is missing":
            print(f"teacher's logits: {shards.path(number)} {faults[number]}, and is made again", flush=True)
    teacher = load() if wanted else None
    if teacher is not None:
        attend_by_document(teacher)  # as in training
    for number in _progress(wanted, shards):
        assert teacher is not None
        _make(stage, teacher, rows, shards, number)
    del teacher
    gc.collect()  # it may stand in cycles, and the student needs its memory
