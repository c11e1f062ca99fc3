"""Published hybrids as students of llamba: which format a folder has, and the folder that is made of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamba.base.foreign import read_object
from llamba.interop import cartesia, mamba_in_llama, phi_mamba
from llamba.interop.folders import Weights, check_names, copy_tokenizer, whole_folder
from llamba.interop.published import Published, Shapes
from llamba.interop.students import expected_tensors, write_student
from llamba.models.loading import load_generation_config
from llamba.models.mixers.outline import FP32_PARAMETERS

Describe = Callable[[Path, Shapes], Published]
KNOWN = "MambaInLlama and M1 (mamba_config.json), Phi-Mamba and Hybrid-Phi-Mamba, Cartesia's Llamba"
SURPLUS = ("rotary_emb.inv_freq", "masked_bias")  # buffers that older code saved; nothing is lost with them


def format_of(folder: Path) -> Describe:
    """The importer for a folder. Raises ValueError for one that is known and cannot be imported (with the reason), and for all others."""
    if (folder / "hybrid_config.json").is_file():
        raise ValueError(
            f"{folder} is a Zebra-Llama (hybrid_config.json, mla_layers) and cannot be imported: the layers that it keeps are multi-head "
            "latent attention, which no family here has"
        )
    if (folder / mamba_in_llama.CONFIG).is_file():
        return mamba_in_llama.describe
    values = read_object(folder / "config.json")
    kind = values.get("model_type")
    if kind == "apriel_hybrid_ssm":
        raise ValueError(
            f"{folder} is an Apriel-H1 (model_type apriel_hybrid_ssm) and cannot be imported: its mixers are Mamba-1 scans in Mamba-2's "
            "layout with a step of low rank beside it, which no mixer here computes"
        )
    if kind == "llamba":
        return cartesia.describe
    if {"LanguageModel", "MixerModel"} <= values.keys():
        return phi_mamba.describe
    if str(kind).startswith("llamba_"):
        raise ValueError(f"{folder} is a student of llamba already (model_type {kind}); load it as it is")
    raise ValueError(f"{folder} must be of a known format: {KNOWN}; got model_type {kind!r} and no file of theirs")


class _Read(dict[str, tuple[int, ...]]):
    """Names and shapes of a checkpoint's tensors, and those of a base model where the checkpoint has none."""

    def __init__(self, weights: Weights, base: Weights | None):
        prefix = "model." if all(name.startswith(("model.model.", "model.lm_head.")) for name in weights) else ""
        self.places: dict[str, tuple[Weights, str]] = {}
        if base is not None:
            self.places |= {name: (base, name) for name in base}
        self.own = {name.removeprefix(prefix): name for name in weights if not name.endswith(SURPLUS)}
        self.places |= {short: (weights, name) for short, name in self.own.items()}
        super().__init__({short: weights.shape(name) for short, name in self.own.items()})

    def tensor(self, name: str) -> Tensor:
        weights, place = self.places[name]
        return weights[place]


@dataclass
class Imported:
    """What an import wrote, and what its reader must know."""

    out: Path
    published: Published
    notes: list[str]

    def __str__(self) -> str:
        """One line for the folder, one for each peculiarity and note."""
        lines = [f"saved: {self.out} ({self.published.name}, {sum(self._recurrent())} of {len(self._recurrent())} layers recurrent)"]
        lines += [f"as published, for these weights alone: {quirk}" for quirk in self.published.quirks]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _recurrent(self) -> list[bool]:
        return [kind == "linear_attention" for kind in self.published.config.layer_types]


def import_checkpoint(source: str | Path, out: str | Path, base: str | Path | None = None) -> Imported:
    """Write a published hybrid as a student of llamba, which `from_pretrained` loads once llamba is imported.

    `base`: the folder of the transformer that the checkpoint was made from, for weights that the checkpoint leaves out.
    Raises ValueError for an unknown or refused format, for a configuration that no mixer computes, for tensors that are missing, surplus
    or of another shape, and where `out` has files; then nothing is written.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"a checkpoint's folder is needed (download it first); {source} is none")
    describe = format_of(folder)
    read = _Read(Weights(folder), None if base is None else Weights(base))
    made = describe(folder, read)
    _check_source(folder, made, read)
    made.config.dtype = _dtype(made, read)
    with whole_folder(out) as place:
        write_student(place, made.config, _tensors(made, read), str(source))
        _generation(folder, place)
        tokenizer = copy_tokenizer(folder, place)
    notes = [] if tokenizer else ["no tokenizer files were found; the folder holds none", *made.notes]
    return Imported(Path(out), made, notes)


def _check_source(folder: Path, made: Published, read: _Read) -> None:
    """Raises ValueError where the table needs tensors that are nowhere, leaves some over, or makes other shapes than ours."""
    needed = {name for take in made.table.values() for name in take.names}
    tied = {"lm_head.weight"} if made.config.tie_word_embeddings else set()
    missing, surplus = sorted(needed - read.places.keys()), sorted(read.keys() - needed - tied)
    if missing or surplus:
        help_ = "" if not missing or ".mamba." in missing[0] else "; the base model's folder, given as base, may hold what is missing"
        problems = [f"{len(names)} {what} ({names[0]})" for what, names in (("missing", missing), ("surplus", surplus)) if names]
        raise ValueError(f"{folder}: the tensors must be those of a {made.name}; got {', '.join(problems)}{help_}")
    check_names(str(folder), expected_tensors(made.config), made_shapes(made, read.places))


def made_shapes(made: Published, places: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors, made on the meta device of theirs. Raises ValueError, naming the tensor, for parts that do not fit."""
    shapes = {}
    for ours, take in made.table.items():
        theirs = [tuple(weights.shape(name)) for weights, name in (places[name] for name in take.names)]
        try:
            shapes[ours] = tuple(take.make(*(torch.empty(shape, device="meta") for shape in theirs)).shape)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{take.names[0]} must have the shape that the configuration asks for; got {list(theirs[0])}") from error
    return shapes


def _tensors(made: Published, read: _Read) -> Iterator[tuple[str, Tensor]]:
    for ours, take in made.table.items():
        tensor = take.make(*(read.tensor(name) for name in take.names))
        yield ours, tensor.float() if ours.endswith(FP32_PARAMETERS) and tensor.dtype.itemsize < 4 else tensor


def _dtype(made: Published, read: _Read) -> torch.dtype:
    return read.tensor(made.table["model.embed_tokens.weight"].names[0]).dtype


def _generation(folder: Path, out: Path) -> None:
    found = load_generation_config(folder) if (folder / "generation_config.json").is_file() else None
    if found is not None:
        found.save_pretrained(out)
