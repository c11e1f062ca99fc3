"""Losses between a student's and a teacher's next-token distributions.

`head_sums` is the door for training: it never holds whole logits. `distill_loss` is the same on logits that you hold.
`span_sums` compares models that count other tokens, by spans of text.
"""

from llamba.training.losses.fused import head_sums
from llamba.training.losses.plain import DIVERGENCES, IGNORE, REDUCTIONS, Mix, Sums, distill_loss, loss_sums
from llamba.training.losses.spans import Aligned, span_divergence, span_sums
from llamba.training.losses.teacher_distribution import Head, TopK

__all__ = [
    "DIVERGENCES",
    "IGNORE",
    "REDUCTIONS",
    "Aligned",
    "Head",
    "Mix",
    "Sums",
    "TopK",
    "distill_loss",
    "head_sums",
    "loss_sums",
    "span_divergence",
    "span_sums",
]
