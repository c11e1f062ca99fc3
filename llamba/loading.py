"""Loading a teacher: in what numbers, on which devices, and whether it speaks the student's language."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel


def _quantised(bits: int, compute: torch.dtype) -> BitsAndBytesConfig:
    """8-bit (LLM.int8, Dettmers et al. 2022) or 4-bit (NF4, Dettmers et al. 2023). Raises ValueError where the package is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"teacher_bits={bits} needs the package bitsandbytes, which is not installed; pip install bitsandbytes")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def load_teacher(name: str, precision: str, bits: int | None = None, devices: torch.device | str | None = None) -> PreTrainedModel:
    """A teacher, frozen: as it was saved for `precision` bf16, in fp32 for fp32, or quantised to `bits` 8 or 4.

    `devices`: where to put it (needed with `bits`), or "auto": over all devices of this process. Raises ValueError where
    bitsandbytes is needed and missing.
    """
    more: dict[str, Any] = {}
    if bits:
        more["quantization_config"] = _quantised(bits, torch.bfloat16 if precision == "bf16" else torch.float32)
    if devices is not None:
        more["device_map"] = devices if devices == "auto" else {"": devices}
    teacher: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if precision == "bf16" else torch.float32, **more)
    return teacher.requires_grad_(False).eval()


def _tokens(name: str) -> dict[int, str] | None:
    """Token by id, None for a folder without a tokenizer."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "tokenizer_config.json").exists():
        return None
    return {number: token for token, number in AutoTokenizer.from_pretrained(name).get_vocab().items()}


def require_same_vocabulary(student: str, teacher: str) -> None:
    """Raises ValueError where two models count different tokens, or where an id that both know means different ones."""
    own, other = (AutoConfig.from_pretrained(name).vocab_size for name in (student, teacher))
    if own != other:
        raise ValueError(f"student and teacher must share a vocabulary, got {own} tokens in {student} and {other} in {teacher}")
    mine, theirs = _tokens(student), _tokens(teacher)
    if mine is None or theirs is None:
        return
    different = sorted(number for number in mine.keys() & theirs.keys() if mine[number] != theirs[number])
    if different:
        first = different[0]
        raise ValueError(
            f"student and teacher must share a vocabulary, got {len(different)} ids with different tokens: "
            f"{first} is {mine[first]!r} in {student} and {theirs[first]!r} in {teacher}"
        )
