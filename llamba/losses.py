"""Losses on logits. Letters: n target tokens, V vocabulary, B batch, T time, D width.

All functions return sums over target tokens in fp32 (or wider, for wider inputs); the caller divides by the number of
target tokens of the whole optimizer step, so that neither accumulation nor the number of processes changes the mean.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # label of a token that is no target, as in Hugging Face
_LOGITS_AT_ONCE = 2**26  # elements of one [n, V] block: 256 MiB in fp32


class Sums(NamedTuple):
    """Sums over target tokens, in nats: the weighted loss (with gradient), its parts, and the number of targets."""

    loss: Tensor
    kl: Tensor
    ce: Tensor
    targets: Tensor


def kl_ce_sums(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sums over n tokens of temperature² · KL(softmax(teacher/t) || softmax(student/t)) and of the cross-entropy.

    `student`, `teacher`: logits [n, V]; `targets`: [n] token ids. The factor temperature² keeps the gradient's scale
    (Hinton et al. 2015, section 2); cross-entropy is at temperature 1.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(wide)
    log_q = F.log_softmax(student, dim=-1)  # [n, V]
    ce = F.nll_loss(log_q, targets, reduction="sum")
    if temperature != 1.0:
        log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return kl * temperature**2, ce


def distill_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, kl: float, ce: float, temperature: float, token_count: Tensor | int
) -> Tensor:
    """(kl · Σ KL + ce · Σ CE) / token_count from whole logits [B, T, V] and labels [B, T] (unshifted, -100 no target).

    The plain form of what `head_sums` computes block by block.
    """
    shifted = labels[:, 1:]
    chosen = shifted != IGNORE  # [B, T-1]
    kl_sum, ce_sum = kl_ce_sums(student[:, :-1][chosen], teacher[:, :-1][chosen], shifted[chosen], temperature)
    return (kl * kl_sum + ce * ce_sum) / token_count


def head_sums(
    student: Tensor,
    teacher: Tensor,
    student_head: nn.Linear,
    teacher_head: nn.Linear,
    labels: Tensor,
    *,
    kl: float,
    ce: float,
    temperature: float,
) -> Sums:
    """Sums of `kl_ce_sums` from last hidden states [B, T, D], never holding logits of tokens that are no targets.

    Position t predicts labels[t + 1]. Logits are made in blocks of targets; where there are several blocks, the
    backward pass makes each again instead of keeping it.
    """
    shifted = labels[:, 1:]
    chosen = shifted != IGNORE  # [B, T-1]
    hidden, guide, targets = student[:, :-1][chosen], teacher[:, :-1][chosen], shifted[chosen]  # [n, D], [n, D'], [n]

    def block(hidden: Tensor, guide: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher_logits = teacher_head(guide)
        return kl_ce_sums(student_head(hidden), teacher_logits, targets, temperature)

    size = max(1, _LOGITS_AT_ONCE // student_head.out_features)
    if len(targets) <= size:
        kl_sum, ce_sum = block(hidden, guide, targets)
    else:
        parts = zip(hidden.split(size), guide.split(size), targets.split(size), strict=True)
        sums = [checkpoint(block, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        kl_sum, ce_sum = (torch.stack(column).sum() for column in zip(*sums, strict=True))
    return Sums(kl * kl_sum + ce * ce_sum, kl_sum.detach(), ce_sum.detach(), chosen.sum())
