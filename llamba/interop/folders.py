"""Model folders as files: tensors by name, read when they are asked for, and folders that are written whole or not at all."""

import json
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llamba.base.foreign import read_object

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
SHARD_BYTES = 4 * 2**30
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@contextmanager
def whole_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends, and leaves nothing where it fails.

    Raises ValueError where `out` is a file or has files.
    """
    place = Path(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"the output must be a new or empty folder; {out} {'has files' if place.is_dir() else 'is a file'}")
    place.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        yield made
        made.chmod(0o755)
        if place.exists():
            place.rmdir()
        made.rename(place)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def copy_tokenizer(source: Path, out: Path) -> bool:
    """Copy the files of the tokenizer; whether there were any."""
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, out / name)
    return "tokenizer_config.json" in found or "tokenizer.json" in found


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: by an index where there is one, safetensors before pickles. Raises ValueError for none."""
    for index in (folder / name for name in INDEXES):
        if index.is_file():
            names = sorted(set(read_object(index).get("weight_map", {}).values()))
            outside = [name for name in names if Path(name).name != name]
            lost = [name for name in names if not (folder / name).is_file()]
            if outside or lost or not names:
                problem = (
                    f"names files elsewhere ({outside[0]})" if outside else f"names {lost[0]}, which is missing" if lost else "is empty"
                )
                raise ValueError(f"{index} must name the weight files beside it; it {problem}")
            return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not found:
        raise ValueError(f"{folder} must hold weights (*.safetensors or pytorch_model.bin), found none")
    return found


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} must be a state dict of tensors that torch reads with weights_only=True; {reason}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} must be a state dict of tensors by name; got {type(found).__name__}")
    return found


class Weights:
    """The tensors of a model folder by name; safetensors are read when asked for, pickles by `weights_only` and mapped into memory.

    Raises ValueError for a folder without weights, for files that cannot be read, and for a name that two files hold.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._where: dict[str, Path | Tensor] = {}
        for path in _weight_files(self.folder):
            held: dict[str, Any] = _load_pickle(path) if path.suffix == ".bin" else dict.fromkeys(_names(path), path)
            twice = sorted(held.keys() & self._where.keys())
            if twice:
                raise ValueError(f"{folder}: each tensor must stand in one file; {twice[0]} stands in {path.name} and in another")
            self._where |= held

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        where = self._where[name]
        if isinstance(where, Tensor):
            return where
        with safe_open(where, "pt") as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without its values."""
        where = self._where[name]
        if isinstance(where, Tensor):
            return tuple(where.shape)
        with safe_open(where, "pt") as file:
            return tuple(file.get_slice(name).get_shape())


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file; {error}") from error


def save_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as they come to safetensors files of at most `shard_bytes` bytes, with the index that Hugging Face reads."""
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    held = total = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if waiting and held + size > shard_bytes:
            shards.append(_save_shard(folder, len(shards), waiting))
            waiting, held = {}, 0
        waiting[name] = tensor.contiguous()
        held, total = held + size, total + size
    shards.append(_save_shard(folder, len(shards), waiting))
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)
    where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    (folder / INDEXES[0]).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))


def _save_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    own = {name: tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor for name, tensor in tensors.items()}
    save_file(own, folder / f"shard-{number}", metadata={"format": "pt"})
    return list(own)


def check_names(source: str, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError where names or shapes of the tensors found are not those expected; one line that names the first of each kind."""
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = [name for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]]
    problems = [f"{len(names)} {what} ({names[0]})" for what, names in (("missing", missing), ("surplus", surplus)) if names]
    if other:
        problems.append(f"{len(other)} of another shape ({other[0]}: needed {list(expected[other[0]])}, got {list(found[other[0]])})")
    if problems:
        raise ValueError(f"{source}: the tensors must be those of its configuration; got {', '.join(problems)}")
