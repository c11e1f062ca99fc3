"""What a model's files must be before and after they are loaded: whole, of the sizes that config.json says, and finite."""

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as QUANTISERS

from llamba.base.foreign import read_object, reading
from llamba.models.families import FAMILIES

INDEX = "model.safetensors.index.json"
_LARGEST = {  # of the sizes in config.json: far above any model, and small enough to be multiplied and counted through
    "num_hidden_layers": 2**12, "hidden_size": 2**20, "intermediate_size": 2**22, "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14, "head_dim": 2**16, "vocab_size": 2**26, "max_position_embeddings": 2**32,
}  # fmt: skip
_POINTER = b"version https://git-lfs"
_FLOATS = ("BF16", "F16", "F32", "F64")
_OLD_BUFFERS = ("rotary_emb.inv_freq", "position_ids")  # in old checkpoints; transformers computes them


class Stored(NamedTuple):
    """A tensor in a file: its number format, as safetensors names it, and its shape."""

    format: str
    shape: tuple[int, ...]


def check_config(path: Path) -> dict[str, Any]:
    """The values of a config.json, whose sizes are whole numbers in range. Raises ValueError that names file and key."""
    values = read_object(path)
    for key, largest in _LARGEST.items():
        value = values.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= largest):
            raise ValueError(f"{path}: {key} must be a whole number from 1 to {largest}, got {str(value)[:40]!r}")
    if not isinstance(values.get("model_type"), str):
        raise ValueError(f"{path}: model_type must be a text like 'llama', got {values.get('model_type')!r}")
    quantised = values.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if quantised is not None and not (isinstance(method, str) and method in QUANTISERS):
        raise ValueError(f"{path}: it is quantised by {str(method)[:40]!r}, which transformers does not know; use the original model")
    return values


def check_ends(path: Path, ends: Any, vocabulary: int | None) -> None:
    """Raises ValueError where the `eos_token_id` of a file, one id or several, is none of the vocabulary: no answer would ever end."""
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(one) is int and 0 <= one and (vocabulary is None or one < vocabulary) for one in ids):
        known = "" if vocabulary is None else f" from 0 to {vocabulary - 1}"
        raise ValueError(f"{path}: eos_token_id must be a token{known}, or a list of such, got {str(ends)[:40]!r}; no answer would end")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model folder is made of, [] where it has none. Raises ValueError where its index names others."""
    index, alone = folder / INDEX, folder / "model.safetensors"
    if alone.is_file() or not index.is_file():  # the order in which transformers looks
        return [alone] if alone.is_file() else []
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index} must have a weight_map from tensor to file, got {str(listed)[:80]}")
    files = [folder / name for name in sorted(set(listed.values()))]
    if lost := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index} names {lost[0]}, which is not there ({len(lost)} of {len(files)} files are missing); download it again")
    return files


def stored(files: Iterable[Path]) -> dict[str, Stored]:
    """The tensors in safetensors files, from their headers. Raises ValueError for a file that is cut off, damaged, or a pointer to it."""
    found: dict[str, Stored] = {}
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise ValueError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull`, or download the file")
        with reading(f"{file} is no whole safetensors file; download it again"), safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                part = opened.get_slice(name)
                found[name] = Stored(part.get_dtype(), tuple(part.get_shape()))
    return found


def check_stored(folder: Path, config: PreTrainedConfig) -> None:
    """Raises ValueError where a folder's weights and its config.json cannot be of one model, before anything large is made.

    Names and shapes are compared for the families that are converted. Of other models, whose names transformers may translate while
    it loads them, only layers and how many numbers there are in all; their names are compared once they are loaded (`check_loaded`).
    """
    tensors = stored(weight_files(folder))
    if not tensors or config.to_dict().get("quantization_config"):
        return
    odd = [f"{name} ({tensor.format})" for name, tensor in tensors.items() if name.endswith("weight") and tensor.format not in _FLOATS]
    if odd:
        raise ValueError(f"{folder}: weights must be stored as {', '.join(_FLOATS)}, got {_some(odd)}; dequantise them first")
    numbers = [int(part) for name in tensors for part in _after(name, "layers")]
    if numbers and max(numbers) + 1 < config.num_hidden_layers:
        lost = config.num_hidden_layers - max(numbers) - 1
        raise ValueError(
            f"{folder}: config.json says num_hidden_layers={config.num_hidden_layers} and the weights hold {max(numbers) + 1} layers: "
            f"tensors of {lost} are missing; restore the files, or correct config.json"
        )
    with reading(f"{folder}: config.json does not describe a model"), torch.device("meta"):
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = kind(config)  # `from_config` would split it over processes under ZeRO-3
    if config.model_type.removeprefix("llamba_") in FAMILIES:
        check_loaded(str(folder), _differences(model, tensors))
    needed, held = sum(weight.numel() for weight in model.parameters()), sum(prod(tensor.shape) for tensor in tensors.values())
    if needed > 2 * held + 1:
        raise ValueError(
            f"{folder}: config.json describes a model of {needed:,} parameters and the files hold {held:,} "
            f"(vocab_size {config.vocab_size}, hidden_size {config.hidden_size}): sizes in it are wrong, or tensors are missing"
        )


def _differences(model: PreTrainedModel, tensors: dict[str, Stored]) -> dict[str, Any]:
    """What `from_pretrained` would report of a model on the meta device and its stored tensors, without loading them."""
    needed = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    held = {name if name in needed or prefix + name not in needed else prefix + name: tensor for name, tensor in tensors.items()}
    tied = {name for pair in (model.all_tied_weights_keys or {}).items() for name in pair}
    shapes = {(name, tensor.shape, needed[name]) for name, tensor in held.items() if name in needed and tensor.shape != needed[name]}
    missing = needed.keys() - held.keys()
    return {
        "missing_keys": missing if tied <= missing else missing - tied,
        "mismatched_keys": shapes,
        "unexpected_keys": {name for name in held.keys() - needed.keys() if not name.endswith(_OLD_BUFFERS)},
    }


def check_finite_files(folder: Path) -> None:
    """Raises ValueError that names the tensors in a folder's files which hold NaN or infinity; they are read one after the other."""
    broken = []
    for file in weight_files(folder):
        with reading(f"{file} is no whole safetensors file; download it again"), safe_open(file, framework="pt") as opened:
            values = ((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118 (it is no dict)
            broken += [name for name, value in values if value.is_floating_point() and not is_finite(value)]
    if broken:
        raise ValueError(f"{folder}: weights must be finite numbers, got NaN or infinity in {_some(broken)}; the file is damaged")


def _after(name: str, word: str) -> list[str]:
    """The number that follows a word in a tensor's dotted name, if any."""
    parts = name.split(".")
    return [number for before, number in zip(parts, parts[1:], strict=False) if before == word and number.isdigit()][:1]


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def check_loaded(name: str, info: dict[str, Any]) -> None:
    """Raises ValueError where transformers found tensors missing, of another shape, or without a place.

    What transformers ties or ignores for the model's class (a tied head, `rotary_emb.inv_freq`) is none of these.
    """
    wrong = []
    if any(".rest_" in key for key in info["missing_keys"]):
        raise ValueError(
            f"{name}: a student with a window needs {_some(info['missing_keys'])}; got one of an earlier llamba: convert it anew"
        )
    if info["missing_keys"]:
        wrong.append(f"missing {_some(info['missing_keys'])}")
    if info["mismatched_keys"]:
        shapes = [f"{key} {list(got)} where {list(needed)} is needed" for key, got, needed in info["mismatched_keys"]]
        wrong.append(f"of another shape {_some(shapes, 2)}")
    if info["unexpected_keys"]:
        wrong.append(f"without a place {_some(info['unexpected_keys'])}")
    if wrong:
        raise ValueError(f"{name}: the weights do not fit config.json: {'; '.join(wrong)}. Restore the files, or correct config.json")


@torch.no_grad()
def is_finite(value: Tensor) -> bool:
    """Whether no number is NaN or infinite: one sum, and a second look where that overflows."""
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def check_finite(name: str, model: PreTrainedModel) -> None:
    """Raises ValueError that names the weights which hold NaN or infinity. Weights that are elsewhere (offloaded) are not read."""
    values = [(key, value.detach()) for key, value in model.named_parameters() if value.is_floating_point() and not value.is_meta]
    if broken := [key for key, value in values if not is_finite(value)]:
        raise ValueError(f"{name}: weights must be finite numbers, got NaN or infinity in {_some(broken)}; the file is damaged")
