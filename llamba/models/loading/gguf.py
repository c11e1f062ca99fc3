"""GGUF files as teachers: dequantised once into an ordinary model folder in the user's cache, from where all else loads them.

transformers 5.23 reads GGUF, but marks the model as quantised: it can then be neither saved nor trained. A folder of plain weights has
no such mark, is mapped into memory in an instant, and is what every other tool takes.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llamba.base.foreign import reading
from llamba.models.loading.checks import check_finite, check_loaded

_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def cache() -> Path:
    """Where dequantised models lie: LLAMBA_CACHE/gguf, by default ~/.cache/llamba/gguf."""
    return Path(os.environ.get("LLAMBA_CACHE", Path.home() / ".cache" / "llamba")) / "gguf"


def unpacked(file: str | Path) -> Path:
    """The model folder of a GGUF file: made now, or the one that was made of this very file (path, size, time of change).

    Raises ValueError for a file that is damaged or of an architecture that transformers does not read, OSError for a full disk.
    """
    path = Path(file).resolve()
    state = path.stat()
    key = hashlib.sha256(f"{path} {state.st_size} {state.st_mtime_ns} {transformers.__version__}".encode()).hexdigest()[:16]
    folder = cache() / f"{path.stem}-{key}"
    if not folder.is_dir():
        _unpack(path, folder)
    return folder


def _unpack(path: Path, folder: Path) -> None:
    """Dequantise `path` into `folder`, which appears whole or not at all; another process may do the same at the same time."""
    print(f"{path.name}: dequantising it once, into {folder}", file=sys.stderr, flush=True)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        model, tokenizer = read(path)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not folder.is_dir():
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read(path: Path) -> tuple[Any, Any]:
    """A GGUF file's model, dequantised, and its tokenizer. Raises ValueError where the file is damaged or cannot be read exactly."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "trust_remote_code": False}
    with reading(f"{path} cannot be read as GGUF"):
        rope = _check(path)
        config = AutoConfig.from_pretrained(**where)
    config.name_or_path = ""
    if rope:
        config.rope_parameters = {**config.rope_parameters, **rope}
    more: dict[str, Any] = {"config": config, "output_loading_info": True}
    kinds = vars(transformers.utils.quantization_config)
    if "GgufConfig" in kinds:  # transformers before 5.23 always dequantises
        more["quantization_config"] = kinds["GgufConfig"](dequantize=True)
    with reading(f"{path} cannot be read as GGUF"):
        made: Any = AutoModelForCausalLM.from_pretrained(**where, **more)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    model, info = made
    check_loaded(str(path), info)
    check_finite(str(path), model)
    return model, tokenizer


def _check(path: Path) -> dict[str, Any]:
    """What of the rotary embedding transformers does not read from the file; raises ValueError for what it would leave out in silence."""
    from gguf import GGUFReader

    found = GGUFReader(path)
    kinds = {key: field.contents() for key, field in found.fields.items() if key.endswith(".rope.scaling.type")}
    if odd := {key: kind for key, kind in kinds.items() if kind not in ("none", "")}:
        raise ValueError(f"its {next(iter(odd))} is {next(iter(odd.values()))!r}, which transformers does not read; use the original model")
    factors = [torch.tensor(tensor.data) for tensor in found.tensors if tensor.name == "rope_freqs.weight"]
    if not factors:
        return {}
    (base,) = (field.contents() for key, field in found.fields.items() if key.endswith(".rope.freq_base"))
    for factor in (8.0, 32.0):
        if torch.allclose(_llama3_factors(base, 2 * len(factors[0]), factor), factors[0].float(), rtol=1e-4):
            return {**_LLAMA3, "factor": factor}
    raise ValueError("its rope_freqs are not those of Llama 3.1 (8) or 3.2 (32); use the original model")


def _llama3_factors(base: float, width: int, factor: float) -> torch.Tensor:
    """What Llama 3.1 divides its `width` / 2 rotary frequencies by (llama.cpp's `rope_freqs`)."""
    waves = 2 * torch.pi * base ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    context, low, high = _LLAMA3["original_max_position_embeddings"], _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    assert isinstance(context, int) and isinstance(low, float) and isinstance(high, float)
    smooth = ((context / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
