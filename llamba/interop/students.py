"""Our own model folders as files: which tensors a configuration asks for, and a student written from tensors that come one by one."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from llamba.interop.folders import check_names, save_weights
from llamba.models.families import family_of


def expected_tensors(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a student's folder, by its configuration alone; a tied head stands in no folder."""
    with torch.device("meta"):
        student = family_of(config).causal_lm(config)
    shapes = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return shapes


def write_student(folder: Path, config: PreTrainedConfig, tensors: Iterator[tuple[str, Tensor]], source: str) -> None:
    """Write a student's configuration and weights. Raises ValueError where the tensors are not those that the configuration asks for."""
    written: dict[str, tuple[int, ...]] = {}

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            written[name] = tuple(tensor.shape)
            yield name, tensor

    save_weights(folder, watched())
    check_names(source, expected_tensors(config), written)
    (folder / "config.json").write_text(json.dumps(json.loads(config.to_json_string(use_diff=False)), indent=2) + "\n")
