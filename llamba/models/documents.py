"""Attention of whole sequences that stays within documents, one document at a time: on a CPU what a mask would hide is not computed.

Letters: B sequences, T tokens.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llamba.kernels.attention import causal_attention

BY_DOCUMENT = "llamba_by_document"  # the name of sdpa that goes by documents, among transformers' implementations of attention


class Documents(NamedTuple):
    """The tokens of each document, in order, for each of B sequences; together they are the T tokens of each sequence."""

    lengths: list[list[int]]

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(length for row in self.lengths for length in row)


def documents_of(position_ids: Tensor | None, attention_mask: Tensor | None, shape: torch.Size) -> Documents:
    """The documents of a batch of whole sequences [B, T]: they start where positions restart; right padding is one by itself."""
    B, T = shape
    if position_ids is not None:
        starts = [(row == 0).nonzero().flatten().tolist() for row in position_ids.expand(B, T)]
        return Documents([[after - first for first, after in zip([0, *row[1:]], [*row[1:], T], strict=True)] for row in starts])
    if attention_mask is None:
        return Documents([[T]] * B)
    real = attention_mask.sum(1).tolist()
    return Documents([[part for part in (tokens, T - tokens) if part] for tokens in real])


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, documents: Any = None, **kwargs: Any
) -> Any:
    """sdpa; with `documents` exactly what the causal mask within them gives, at the price of their own squares."""
    window = kwargs.get("sliding_window")
    if documents is None or kwargs.get("dropout") or (window is not None and documents.longest > window):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = _computed_in(query, key, value)
    return causal_attention(query, key, value, kwargs["scaling"], documents.lengths), None


def _computed_in(*tensors: Tensor) -> Iterator[Tensor]:
    """The tensors in one dtype: autocast's, where that is on, as for sdpa."""
    kind = tensors[0].device.type
    lowered = torch.is_autocast_enabled(kind) and tensors[0].dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if lowered else tensors[0].dtype
    return (tensor.to(dtype) for tensor in tensors)


AttentionInterface.register(BY_DOCUMENT, _attention)
AttentionMaskInterface.register(BY_DOCUMENT, sdpa_mask)


def attend_by_document(model: PreTrainedModel) -> None:
    """Let a model on a CPU whose attention is sdpa take it by documents, where a call names them; all else stays."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(BY_DOCUMENT)


def by_document(model: Any, batch: dict[str, Tensor]) -> dict[str, Documents]:
    """The argument `documents` for a forward pass of the batch, where the model makes use of it."""
    if model.config._attn_implementation != BY_DOCUMENT:
        return {}
    return {"documents": documents_of(batch.get("position_ids"), batch.get("attention_mask"), batch["input_ids"].shape)}
