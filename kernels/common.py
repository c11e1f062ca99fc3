"""What the kernels share: argument checks, the number format of the accumulation, documents and masks.

Shapes: B batch, T time.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Raise `ValueError` unless `tensor` is None or has exactly this `shape`."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def check_rank(name: str, tensor: Tensor, letters: str) -> None:
    """Raise `ValueError` unless `tensor` has one dimension per letter of `letters`."""
    if tensor.ndim != len(letters):
        raise ValueError(f"{name} must have {len(letters)} dimensions [{', '.join(letters)}], got shape {list(tensor.shape)}")


def check_positive(name: str, value: int) -> None:
    """Raise `ValueError` unless `value` is at least 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The number format of states and sums for inputs of `dtype`: fp64 stays, everything else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lowest_exponent(dtype: torch.dtype) -> float:
    """The exponent below which a decay counts as nothing: where its result underflows, exp is many times slower."""
    return -708.0 if dtype == torch.float64 else -87.0


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast leaves operations on the device of `tensor` alone."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def documents(seq_idx: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The document number [B, T] of each token, an absent token taking that of the real token before it (0 if none)."""
    if seq_idx is None or mask is None:
        return seq_idx
    return seq_idx.masked_fill(~mask, 0).cummax(1).values


def document_before(docs: Tensor) -> Tensor:
    """The document number [B, T] that the state before each token belongs to: 0 at the first token."""
    return torch.cat([torch.zeros_like(docs[:, :1]), docs[:, :-1]], 1)


def traced(length: int) -> bool:
    """Whether a graph is being traced that may have to hold for other lengths too: then no loop and no branch may depend on them."""
    return torch.compiler.is_dynamo_compiling() or not isinstance(length, int)
