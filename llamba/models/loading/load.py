"""Models, configurations and tokenizers by name: where they are, and loading them whole or not at all."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

from llamba.base.folders import is_gguf, resolve_model
from llamba.base.foreign import read_object, reading
from llamba.models.loading.checks import check_config, check_ends, check_finite, check_loaded, check_stored, weight_files
from llamba.models.loading.gguf import unpacked

_GENERATION = "generation_config.json"
_TOKENIZER = "tokenizer_config.json"
_TOKENIZERS = ("tokenizer.json", _TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def located(name: str | Path) -> str:
    """Where a model's files are: a folder (of a GGUF file: the one it is dequantised into), or a hub name.

    Raises ValueError for a name that means no model.
    """
    path = resolve_model(name)
    return str(unpacked(path)) if is_gguf(path) else path


def _wanted(name: str, path: str) -> str:
    """The beginning of a message about a model that cannot be loaded."""
    return f"{name} cannot be loaded" if Path(path).exists() else f"{name} must be a model folder or a hub name that can be reached"


def load_config(name: str | Path) -> PreTrainedConfig:
    """A model's configuration. Raises ValueError where there is none that describes a model, and for broken generation settings."""
    path = located(name)
    folder = Path(path)
    if folder.is_dir():
        check_config(folder / "config.json")
    with reading(_wanted(str(name), path)):
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if folder.is_dir():
        values = config.to_dict()
        check_ends(folder / "config.json", values.get("eos_token_id"), values.get("vocab_size"))
        if (folder / _GENERATION).is_file():  # transformers goes on without a broken one
            check_ends(folder / _GENERATION, read_object(folder / _GENERATION).get("eos_token_id"), values.get("vocab_size"))
    return config


class _Unreported(logging.Filter):
    """Keeps back transformers' table of odd tensors, which `check_loaded` says in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()


@contextmanager
def _unreported() -> Iterator[None]:
    logger, own = logging.getLogger("transformers.modeling_utils"), _Unreported()
    logger.addFilter(own)
    try:
        yield
    finally:
        logger.removeFilter(own)


def load_model(name: str | Path, dtype: torch.dtype | str = "auto", **more: Any) -> Any:
    """A causal LM with every weight from its files, in eval mode. `dtype` "auto" is as it is stored; `more` goes to `from_pretrained`.

    Raises ValueError, naming them, for tensors that are missing, surplus, of another shape or not finite; for files that are cut off
    or damaged; and for a name that means no model.
    """
    config, path = load_config(name), located(name)
    if Path(path).is_dir():
        require_weights(Path(path))
        check_stored(Path(path), config)
    with reading(_wanted(str(name), path)), _unreported():
        made: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False, **more
        )
    model, info = made
    check_loaded(str(name), info)
    check_finite(str(name), model)
    return model.eval()


def require_weights(folder: Path) -> None:
    """Raises ValueError for a model folder without weights."""
    if not weight_files(folder) and not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        raise ValueError(f"{folder} must be a model folder with weights (*.safetensors), found none")


def has_tokenizer(name: str | Path) -> bool:
    """Whether a model's folder has a tokenizer's files; a hub name is taken to have them."""
    path = Path(located(name))
    return not path.is_dir() or any((path / file).is_file() for file in _TOKENIZERS)


def load_tokenizer(name: str | Path) -> Any:
    """A model's tokenizer. Raises ValueError where its folder has none or a broken one, or a broken config.json, which is read for it."""
    path = located(name)
    folder = Path(path)
    if not has_tokenizer(path):
        raise ValueError(f"{name} has no tokenizer (tokenizer.json); copy the files of the model that it was made from into the folder")
    if (folder / "config.json").is_file():
        load_config(path)
    if (folder / _TOKENIZER).is_file():
        read_object(folder / _TOKENIZER)
    with reading(f"the tokenizer of {name} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return tokenizer


def load_generation_config(name: str | Path) -> GenerationConfig | None:
    """A model's generation settings, None where it has none. Raises ValueError for a broken file."""
    path = located(name)
    if Path(path).is_dir() and not (Path(path) / _GENERATION).is_file():
        return None
    with reading(f"the generation settings of {name} cannot be loaded"):
        try:
            return GenerationConfig.from_pretrained(path)
        except OSError:
            if Path(path).is_dir():
                raise
    return None  # a hub model without them


def ends_of(name: str | Path, config: PreTrainedConfig) -> list[int]:
    """Ids that end an answer: of the model's generation settings, else of its configuration."""
    own = load_generation_config(name)
    given = config.eos_token_id if own is None else own.eos_token_id
    return given if isinstance(given, list) else [] if given is None else [given]
