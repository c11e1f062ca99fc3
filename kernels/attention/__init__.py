"""Causal softmax attention within documents, for training on a CPU: forward and gradient by blocks of queries, in matrix products.

PyTorch's own form for CPUs computes what a causal mask hides, and in bf16 takes its products apart. Here a block of queries meets the
keys of its document up to its last token, and nothing else.
Shapes: B sequences, T tokens, H query heads, G key/value heads, R = H // G, P head width, q queries of a block, n keys before its end.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import accumulator, check_shape, no_autocast

__all__ = ["causal_attention"]

BLOCK = 128  # queries that are taken together


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Sequence[Sequence[int]]) -> Tensor:
    """softmax(scale q kᵀ) v, each token over its document's tokens up to itself.

    query [B, H, T, P], key and value [B, G, T, P] of one dtype; `lengths`: tokens of the documents of each sequence, T together.
    Scores and probabilities are in at least fp32, products with values in the dtype of the inputs. Memory does not grow with T². Returns
    [B, T, H, P]. Raises ValueError for shapes that do not fit together.
    """
    (B, H, T, P), G = query.shape, key.shape[1]
    check_shape("key", key, B, G, T, P)
    check_shape("value", value, B, G, T, P)
    if H % G or [sum(row) for row in lengths] != [T] * B:
        raise ValueError(f"needs H a multiple of G and documents of T tokens together, got H={H}, G={G}, T={T} and documents {lengths}")
    made: Tensor = _Causal.apply(query, key, value, scale, lengths)
    return made


def _blocks(lengths: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, int, int]]:
    """Sequence, first token of the document, first and last + 1 query of every block."""
    for row, documents in enumerate(lengths):
        start = 0
        for length in documents:
            for first in range(start, start + length, BLOCK):
                yield row, start, first, min(first + BLOCK, start + length)
            start += length


def _stacked(heads: Tensor, G: int) -> Tensor:
    """[H, q, P] as the stacked queries [G, R q, P] of each group."""
    return heads.reshape(G, -1, heads.shape[-1])


def _weights(query: Tensor, key: Tensor, scale: float, q: int) -> Tensor:
    """Probabilities [G, R q, n] in the accumulation format, 0 at keys behind the query. query [G, R q, P], key [G, n, P]."""
    acc = accumulator(query.dtype)
    scores = torch.bmm(query.to(acc) * scale, key.to(acc).mT)
    own = scores.view(scores.shape[0], -1, q, scores.shape[2])[..., -q:]  # [G, R, q, q]
    own.masked_fill_(torch.ones(q, q, dtype=torch.bool, device=scores.device).triu_(1), -torch.inf)
    return torch.softmax(scores, -1)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Sequence[Sequence[int]]) -> Tensor:
        """The outputs [B, T, H, P]; keeps them and the inputs."""
        (B, H, T, P), G = query.shape, key.shape[1]
        out = query.new_empty(B, T, H, P)
        with no_autocast(query):
            for row, start, first, end in _blocks(lengths):
                weights = _weights(_stacked(query[row, :, first:end], G), key[row, :, start:end], scale, end - first)
                mixed = torch.bmm(weights.to(query.dtype), value[row, :, start:end])
                out[row, first:end] = mixed.view(H, end - first, P).transpose(0, 1)
        ctx.save_for_backward(query, key, value, out)
        ctx.scale, ctx.lengths = scale, lengths
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        query, key, value, out = ctx.saved_tensors
        G, dtype, acc = key.shape[1], query.dtype, accumulator(query.dtype)
        dquery = torch.empty_like(query)
        dkey, dvalue = (torch.zeros_like(tensor, dtype=acc) for tensor in (key, value))
        inner = (out * dout).sum(-1, dtype=acc).transpose(1, 2)  # [B, H, T]
        with no_autocast(query):
            for row, start, first, end in _blocks(ctx.lengths):
                q, n = _stacked(query[row, :, first:end], G), slice(start, end)
                up = _stacked(dout[row, first:end].transpose(0, 1), G)  # [G, R q, P]
                weights = _weights(q, key[row, :, n], ctx.scale, end - first)  # [G, R q, n]
                dvalue[row, :, n] += torch.bmm(weights.to(dtype).mT, up)
                slope = torch.bmm(up, value[row, :, n].mT).to(acc)
                slope = slope.sub_(inner[row, :, first:end].reshape(G, -1, 1)).mul_(weights).to(dtype)
                dquery[row, :, first:end] = torch.bmm(slope, key[row, :, n]).mul_(ctx.scale).view(-1, end - first, q.shape[-1])
                dkey[row, :, n] += torch.bmm(slope.mT, q)
        return dquery, dkey.mul_(ctx.scale).to(dtype), dvalue.to(dtype), None, None
