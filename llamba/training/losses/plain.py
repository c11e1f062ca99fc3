"""The losses as they are defined, on whole logits. Letters: n tokens, V vocabulary, B batch, T time.

P is the teacher's distribution and Q the student's, both at the temperature. All functions return sums over tokens, in
nats, in fp32 (or wider, for wider inputs); the caller divides by the number of target tokens of the whole optimizer
step, so that neither accumulation nor the number of processes changes the mean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llamba.data.batches import IGNORE

REDUCTIONS = ("token_mean", "batchmean_legacy")


class Sums(NamedTuple):
    """Sums over target tokens, in nats: the weighted loss (with gradient), its parts, and the number of targets."""

    loss: Tensor
    kl: Tensor
    ce: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Mix:
    """`kl` · temperature² · D(P, Q) + `ce` · cross-entropy of the student at temperature 1.

    `divergence` names D in `DIVERGENCES`; `beta` is the JSD's. The factor temperature² keeps the gradient's scale (Hinton
    et al. 2015, section 2).
    """

    kl: float
    ce: float
    temperature: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must be between 0 and 1 (its limits are forward_kl and reverse_kl), got {self.beta}")


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def forward_kl(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Σ KL(P || Q): the student covers all that the teacher may say."""
    return _kl(log_p, log_q)


def reverse_kl(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Σ KL(Q || P): the student says only what the teacher may say (MiniLLM, Gu et al. 2024, section 2.1)."""
    return _kl(log_q, log_p)


def jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Σ β KL(P || M) + (1-β) KL(Q || M), M = β P + (1-β) Q (GKD, Agarwal et al. 2024, equation 1)."""
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def loss_sums(mix: Mix, student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over n tokens of temperature² · D and of the cross-entropy, both with gradient.

    `student`, `teacher`: logits [n, V]; `targets`: [n] token ids, -100 where a token has no cross-entropy.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(wide)
    log_q = F.log_softmax(student, dim=-1)  # [n, V]
    ce = F.nll_loss(log_q, targets, ignore_index=IGNORE, reduction="sum")
    if mix.temperature != 1.0:
        log_q = F.log_softmax(student / mix.temperature, dim=-1)
    log_p = F.log_softmax(teacher / mix.temperature, dim=-1)
    return DIVERGENCES[mix.divergence](log_q, log_p, mix.beta) * mix.temperature**2, ce


def distill_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    kl: float,
    ce: float,
    temperature: float = 1.0,
    token_count: Tensor | int,
    divergence: str = "forward_kl",
    beta: float = 0.5,
) -> Tensor:
    """(kl · Σ D + ce · Σ CE) / token_count from whole logits [B, T, V] and labels [B, T] (unshifted, -100 no target).

    The plain form of what `head_sums` computes in chunks.
    """
    shifted = labels[:, 1:]
    chosen = shifted != IGNORE  # [B, T-1]
    mix = Mix(kl, ce, temperature, divergence, beta)
    kl_sum, ce_sum = loss_sums(mix, student[:, :-1][chosen], teacher[:, :-1][chosen], shifted[chosen])
    return (kl * kl_sum + ce * ce_sum) / token_count
