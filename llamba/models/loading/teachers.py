"""Loading a teacher: in what numbers, on which devices, and whether it speaks the student's language."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from llamba.models.families import family_of
from llamba.models.loading.checks import check_finite_files, check_stored
from llamba.models.loading.load import has_tokenizer, load_config, load_model, load_tokenizer, located, require_weights


def require_bitsandbytes(bits: int) -> None:
    """Raises ValueError where the package that quantises is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"teacher_bits={bits} needs the package bitsandbytes, which is not installed; pip install bitsandbytes")


def _quantised(bits: int, compute: torch.dtype) -> BitsAndBytesConfig:
    """8-bit (LLM.int8, Dettmers et al. 2022) or 4-bit (NF4, Dettmers et al. 2023). Raises ValueError where the package is missing."""
    require_bitsandbytes(bits)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def load_teacher(name: str, precision: str, bits: int | None = None, devices: torch.device | str | None = None) -> PreTrainedModel:
    """A teacher, frozen: as it was saved for `precision` bf16, in fp32 for fp32, or quantised to `bits` 8 or 4.

    `devices`: where to put it (needed with `bits`), or "auto": over all devices of this process. Raises ValueError where
    bitsandbytes is needed and missing, and as `load_model`.
    """
    more: dict[str, Any] = {}
    if bits:
        more["quantization_config"] = _quantised(bits, torch.bfloat16 if precision == "bf16" else torch.float32)
    if devices is not None:
        more["device_map"] = devices if devices == "auto" else {"": devices}
    teacher: PreTrainedModel = load_model(name, "auto" if precision == "bf16" else torch.float32, **more)
    return teacher.requires_grad_(False)


def require_model(name: str) -> PreTrainedConfig:
    """The configuration of a model that can be loaded: its files are there, whole, and of the sizes that config.json says.

    Raises ValueError otherwise. The numbers themselves are not read.
    """
    config, path = load_config(name), Path(located(name))
    if path.is_dir():
        require_weights(path)
        check_stored(path, config)
    return config


def require_sound(name: str) -> PreTrainedConfig:
    """As `require_model`, and the numbers are read, too: each of them finite. For models that others load, or load hours later."""
    config, path = require_model(name), Path(located(name))
    if path.is_dir():
        check_finite_files(path)
    return config


def require_alike(stage: str, student: str, teacher: str) -> None:
    """Raises ValueError for a stage that compares layer by layer, where the two models' layers do not answer to each other."""
    own, other = require_model(student), require_model(teacher)
    family_of(other)
    keys = ("num_hidden_layers", "hidden_size", "vocab_size", *(("num_attention_heads",) if stage == "matrix" else ()))
    for key in keys:
        if getattr(own, key) != getattr(other, key):
            raise ValueError(
                f"stage {stage} needs a student and a teacher with the same {key}, got {getattr(own, key)} in {student} and "
                f"{getattr(other, key)} in {teacher}"
            )


def _tokens(name: str) -> dict[int, str] | None:
    """Token by id, None for a folder without a tokenizer."""
    return {number: token for token, number in load_tokenizer(name).get_vocab().items()} if has_tokenizer(name) else None


SPANS_INSTEAD = "distill.match='spans' compares spans of text"  # where a teacher counts other tokens


def vocabularies_differ(student: str, teacher: str) -> str | None:
    """How the tokens of two models differ, None where they do not: another number, or an id that both know and that means two."""
    own, other = (load_config(name).vocab_size for name in (student, teacher))
    if own != other:
        return f"{own} tokens in {student} and {other} in {teacher}"
    mine, theirs = _tokens(student), _tokens(teacher)
    if mine is None or theirs is None:
        return None
    different = sorted(number for number in mine.keys() & theirs.keys() if mine[number] != theirs[number])
    if not different:
        return None
    first = different[0]
    return f"{len(different)} ids with different tokens: {first} is {mine[first]!r} in {student} and {theirs[first]!r} in {teacher}"


def require_same_vocabulary(student: str, teacher: str, instead: str = "") -> None:
    """Raises ValueError where two models count different tokens, or where an id that both know means different ones.

    `instead`: what else may be done.
    """
    if got := vocabularies_differ(student, teacher):
        raise ValueError(f"student and teacher must share a vocabulary, got {got}{instead and f'; {instead}'}")
