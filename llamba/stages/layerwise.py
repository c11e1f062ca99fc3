"""What the stages share that align layer by layer: models that match, what each layer is called with, which tokens count.

Shapes: B batch, T time, D model width.
"""

from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any, NamedTuple

from torch import Tensor, nn

from llamba.data.batches import Batch
from llamba.models.hybrid import HybridCausalLM, mixer_layers
from llamba.models.loading import require_alike
from llamba.models.masks import document_numbers, padding_mask
from llamba.models.mixers import Recurrence
from llamba.settings import TokenTraining
from llamba.stages.shared import Pair, load_pair
from llamba.training.losses import IGNORE


class LayerCalls(NamedTuple):
    """What each layer of the student is called with beside its hidden states; the real tokens and documents of the batch; and where and
    in which number format the student has its hidden states."""

    layers: list[dict[str, Any]]
    rec: Recurrence
    own: Callable[[Tensor], Tensor]


def layer_calls(student: Any, stream: Tensor, batch: Batch) -> LayerCalls:
    """For a batch whose tokens have the hidden states `stream` [B, T, D]."""
    positions, given = batch.get("position_ids"), batch.get("attention_mask")
    mask = padding_mask(given, stream.shape[1])
    own = methodcaller("to", student.device, student.dtype)
    _, layers = student.base_model.prepare(own(stream), given, positions)
    return LayerCalls(layers, Recurrence(mask, document_numbers(None, positions, mask)), own)


def target_mask(batch: Batch) -> Tensor:
    """True [B, T] at tokens that predict a target, as the losses on logits count them."""
    return nn.functional.pad(batch["labels"][:, 1:] != IGNORE, (0, 1))


def trained_in(layers: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The trained weights of these layers."""
    return [weight for layer in layers for weight in layer.parameters() if weight.requires_grad]


def load_matching(stage: TokenTraining, student: str, teacher: str) -> Pair:
    """Both models, of the same depth and width (and, for matrices, heads).

    Raises ValueError for models that differ in these, and for a student without a converted layer.
    """
    require_alike(stage.name, student, teacher)
    student_model, teacher_model = load_pair(stage, student, teacher)
    if not isinstance(student_model, HybridCausalLM) or not mixer_layers(student_model.config):
        raise ValueError(f"stage {stage.name} needs a student with converted layers, got {student}, which is all attention")
    return student_model, teacher_model
