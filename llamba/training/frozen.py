"""What does not learn costs less: frozen matrices in bf16, in one memory for student and teacher, and first layers that run once.

All of it is what autocast computes anyway, number for number. Letters: B batch, T time, D model width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamba.models.hybrid import RECURRENT, HybridCausalLM


def _stored(folder: Path) -> dict[str, Path]:
    """Which file of a model folder has a tensor of this name; empty for what is no folder with safetensors."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _products(model: nn.Module) -> dict[str, Tensor]:
    """Frozen fp32 weights of linear layers inside the model's layers, by name: what autocast casts anew in every forward pass."""
    weights = {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        name: weight for name, weight in weights.items()
        if ".layers." in name and not weight.requires_grad and weight.dtype == torch.float32
    }  # fmt: skip


def lower(teacher: PreTrainedModel) -> None:
    """Put the matrices of a teacher's layers into bf16 for good; embeddings, norms and with them the residual stream stay as they are."""
    for weight in _products(teacher).values():
        weight.data = weight.data.bfloat16()


class Lowered:
    """A student's frozen matrices in bf16. What they were is read from its folder again when it is saved.

    A weight that the folder does not have under its name, or has with other values, stays as it is.
    """

    def __init__(self, student: PreTrainedModel, folder: Path) -> None:
        stored = _stored(folder)
        self.folder = folder
        self.weights = {name: weight for name, weight in _products(student).items() if name in stored}
        self.files = {name: stored[name] for name in self.weights}
        for name, original in self._originals():
            weight = self.weights[name]
            if torch.equal(original.to(weight.device), weight.data):
                weight.data = weight.data.bfloat16()
            else:
                del self.weights[name], self.files[name]

    def _originals(self) -> Iterator[tuple[str, Tensor]]:
        for path in sorted(set(self.files.values())):
            with safe_open(path, "pt") as file:
                for name in [name for name, own in self.files.items() if own == path]:
                    yield name, file.get_tensor(name).float()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Within it, the weights are what they were, in fp32 and on the CPU: for saving, not for computing."""
        low = {name: weight.data for name, weight in self.weights.items()}
        try:
            for name, original in self._originals():
                self.weights[name].data = original
            yield
        finally:
            for name, value in low.items():
                self.weights[name].data = value


def share(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Let the student's frozen weights be the teacher's, in one memory, where they are equal."""
    theirs = dict(teacher.named_parameters())
    for name, weight in student.named_parameters():
        other = theirs.get(name)
        if weight.requires_grad or other is None or (weight.dtype, weight.device) != (other.dtype, other.device):
            continue
        if torch.equal(weight.data, other.data):
            weight.data = other.data


def _same(own: nn.Module, other: nn.Module) -> bool:
    """Whether two modules of one class are the same weights in one memory."""
    pairs = zip(own.named_parameters(), other.named_parameters(), strict=False)
    alike = all(name == theirs and weight.data_ptr() == twin.data_ptr() for (name, weight), (theirs, twin) in pairs)
    return type(own) is type(other) and alike and len(list(own.parameters())) == len(list(other.parameters()))


_SETTINGS = (
    "rope_parameters",
    "rms_norm_eps",
    "layer_norm_eps",
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
)
_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")


def shared_layers(student: PreTrainedModel, teacher: PreTrainedModel) -> int:
    """How many first layers, and the embeddings before them, are one computation in both: weights that `share` made one, and no dropout.

    0 for a student that is no hybrid.
    """
    own, other = student.config.to_dict(), teacher.config.to_dict()
    if not isinstance(student, HybridCausalLM) or any(own.get(key) for key in _DROPOUTS):
        return 0
    if any(own.get(key) != other.get(key) for key in _SETTINGS):
        return 0
    if not _same(student.get_input_embeddings(), teacher.get_input_embeddings()):
        return 0
    kinds = other.get("layer_types") or own["layer_types"]
    mine: Any = student.base_model.layers
    theirs: Any = teacher.base_model.layers
    for number, pair in enumerate(zip(mine, theirs, strict=False)):
        if own["layer_types"][number] != kinds[number] or kinds[number] == RECURRENT or not _same(*pair):
            return number
    return min(len(mine), len(theirs))
