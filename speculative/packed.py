"""A model's matrices for decoding on a CPU: laid out once as the matrix library wants them, or in 8 bits.

A step of decoding reads every weight once; a plain `nn.Linear` reads bf16 weights at a third of what the memory gives, because they are
laid out anew in every call. Letters: n tokens of a call, K inputs, N outputs of a matrix.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamba.models.offloaded import is_offloaded

MOST = 64  # tokens of a call up to which the layout pays
FEW = 8  # tokens of a call up to which the 8-bit kernel pays
WIDE = 16  # inputs that the 8-bit kernel reads at a time, beyond the end of rows that are no multiple of it

Product = Callable[[Tensor], Tensor]

_made: weakref.WeakKeyDictionary[PreTrainedModel, tuple[tuple[int, ...], dict[nn.Linear, Product]]] = weakref.WeakKeyDictionary()


def _laid_out(linear: nn.Linear) -> Product:
    """x W^T + b, with W in oneDNN's own layout."""
    weight, bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1), linear.bias

    def product(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    return product


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [N, K] as int8 and a scale for each row [N], in the weight's dtype: W = int8 * scale, the largest of a row is 127."""
    scale = weight.abs().amax(1).float().clamp_min(torch.finfo(torch.float32).smallest_normal) / 127
    scale = scale.to(weight.dtype)
    return (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8 with a scale for each output; inputs stay in bf16 (LLM.int8's weight format, weight-only)."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantised(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= FEW:
            y = torch._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale)
        else:
            y = rows @ self.weight.to(x.dtype).T * self.scale
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


def to_int8(model: PreTrainedModel) -> PreTrainedModel:
    """Put the model's matrices into 8 bits, in place; embeddings, norms, convolutions and what decides decays stay as they are.

    So do matrices whose inputs are no multiple of 16. A head that is tied to the embedding gets weights of its own. Raises ValueError
    for a model that is not in bf16 on a CPU, is elsewhere in part, or has no plain matrix that fits.
    """
    if model.dtype != torch.bfloat16 or model.device.type != "cpu" or is_offloaded(model):
        raise ValueError(f"8-bit weights need a model in bfloat16 on a CPU, all of it; got {model.dtype} on {model.device}")
    places = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children() if _fits(child)]
    if not places:
        raise ValueError(
            f"8-bit weights need plain matrices with a multiple of {WIDE} inputs, and {type(model).__name__} has none: it is quantised "
            "already, or too narrow"
        )
    for parent, name, child in places:
        setattr(parent, name, Int8Linear(child))
    return model.eval()


def _fits(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and module.in_features % WIDE == 0


def _state(weight: Tensor) -> tuple[int, int]:
    """Where a weight is, and how often it was written to (which is not counted of what was made under inference mode)."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _products(model: PreTrainedModel) -> dict[nn.Linear, Product]:
    """The model's matrices laid out: made when first asked for, and again when a weight has moved or been written to."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    key = tuple(number for linear in linears for number in _state(linear.weight))
    known = _made.get(model)
    if known is None or known[0] != key:
        known = _made[model] = (key, {linear: _laid_out(linear) for linear in linears})
    return known[1]


def runs_in_graphs(model: PreTrainedModel) -> bool:
    """Whether the layout serves: bf16 weights, all of them in memory, on a CPU whose matrix library takes them."""
    if is_offloaded(model):
        return False
    return model.device.type == "cpu" and model.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _forward(linear: nn.Linear, product: Product, x: Tensor) -> Tensor:
    return product(x) if x.numel() <= MOST * linear.in_features else nn.functional.linear(x, linear.weight, linear.bias)


@contextmanager
def packed(*models: Any) -> Iterator[None]:
    """Within it, products of few tokens with these models' matrices go by the laid-out weights, where `serves`. No gradients.

    The weights stand in memory twice from then on, until the model goes.
    """
    changed: list[nn.Linear] = []
    for model in models:
        if isinstance(model, PreTrainedModel) and runs_in_graphs(model):
            for linear, product in _products(model).items():
                if "forward" not in linear.__dict__:  # someone's hook, or this function's own
                    linear.__dict__["forward"] = partial(_forward, linear, product)
                    changed.append(linear)
    try:
        yield
    finally:
        for linear in changed:
            linear.__dict__.pop("forward", None)
