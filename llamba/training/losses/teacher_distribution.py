"""Where a chunk's teacher distribution comes from. Letters: n tokens, c tokens of a chunk, k kept entries, D' width, V vocabulary."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Head(NamedTuple):
    """A teacher at hand: its last hidden states [n, D'] and its head, whatever kind of module that is.

    `weight` stands in for the head's own: the same in the dtype that is computed in, so that no chunk casts it anew.
    """

    hidden: Tensor
    head: nn.Module
    weight: Tensor | None = None

    def log_p(self, part: slice, log_q: Tensor, temperature: float) -> Tensor:
        """log P at the temperature for the tokens of `part`, [c, V], new, in the dtype of the student's `log_q`."""
        hidden = self.hidden[part]
        if self.weight is None:  # forward, not a call: the caller is inside the head's call, and its hooks have run
            logits = self.head.forward(hidden)
        else:
            logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight)
        logits = logits.to(log_q.device, log_q.dtype)
        return (logits / temperature if temperature != 1.0 else logits).log_softmax(-1)


class TopK(NamedTuple):
    """A teacher that ran before: log P of its k likeliest tokens at the temperature, and of all others together.

    `values` [n, k] with `indices` [n, k]; `tail` [n] is log of the mass outside them (-inf for k = V).
    """

    values: Tensor
    indices: Tensor
    tail: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float) -> "TopK":
        """The k likeliest of logits [n, V]. The tail's mass is summed, not taken as a difference from 1."""
        log_p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
        values, indices = log_p.topk(k, dim=-1)
        tail = log_p.scatter_(-1, indices, -torch.inf).logsumexp(-1)
        return cls(values, indices, tail)

    def log_p(self, part: slice, log_q: Tensor, temperature: float) -> Tensor:
        """[c, V]: the kept entries, and the tail's mass spread over the other tokens as the student spreads its own.

        Every divergence between this and Q is then the divergence over k + 1 buckets, in value and in gradient.
        """
        values, indices, tail = (item[part].to(log_q.device) for item in self)
        indices = indices.long()
        if indices.shape[-1] == log_q.shape[-1]:
            return torch.empty_like(log_q).scatter_(-1, indices, values.to(log_q.dtype))
        own_tail = log_q.scatter(-1, indices, -torch.inf).logsumexp(-1)  # [c]
        return (log_q + (tail.to(log_q.dtype) - own_tail)[:, None]).scatter_(-1, indices, values.to(log_q.dtype))
