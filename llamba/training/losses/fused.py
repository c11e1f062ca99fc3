"""The losses from hidden states, in chunks of tokens, with the gradients made in the forward pass.

Each chunk's logits turn into the loss and at once into the gradients of hidden states and head, so nothing of size
[n, V] is ever kept and nothing is computed twice (Wijmans et al. 2024, "Cut Your Losses", and Liger Kernel do the like
for cross-entropy). Letters: B batch, T time, D student width, D' teacher width, V vocabulary, n tokens, c tokens of a chunk.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llamba.training.losses.plain import IGNORE, REDUCTIONS, Mix, Sums
from llamba.training.losses.teacher_distribution import Head, TopK
from llamba.training.wrapped_forward import run_as_forward

LOGITS_AT_ONCE = {"cpu": 2**22}  # elements of one [c, V] block by kind of device, in fp32; about five blocks live at a time
LOGITS_AT_ONCE_ELSEWHERE = 2**26

Teacher = Head | TopK

# A divergence from log Q and log P, both [c, V] and overwritten: its sum, and its gradient w.r.t. logits / temperature


def _forward_kl(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    value = log_p.sub_(log_q).mul_(p).sum()
    return value, log_q.exp_().sub_(p)


def _centred(q: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Σ q u and q (u - mean of u under q): the gradient of every f-divergence through the softmax."""
    mean = torch.linalg.vecdot(q, u)[:, None]  # [c, 1]
    return mean.sum(), u.sub_(mean).mul_(q)


def _reverse_kl(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    u = log_p.neg_().add_(log_q)
    return _centred(log_q.exp_(), u)


def _jsd(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    p = log_p.exp()
    teacher_part = log_p.sub_(log_m).mul_(p).sum()
    value, gradient = _centred(log_q.exp(), log_m.neg_().add_(log_q))
    return beta * teacher_part + (1 - beta) * value, gradient.mul_(1 - beta)


_GRADIENTS: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}


def _chunk(mix: Mix, logits: Tensor, targets: Tensor, teacher: Teacher, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of temperature² · D and of CE over a chunk, and the gradient of their mix w.r.t. its `logits` [c, V], which are overwritten."""
    log_q = logits.log_softmax(-1)
    wanted, index = targets != IGNORE, targets.clamp_min(0)[:, None]  # [c], [c, 1]
    ce = -log_q.gather(1, index)[:, 0][wanted].sum()
    slope = None
    if mix.ce:
        weight = wanted.to(log_q.dtype)[:, None] * mix.ce  # [c, 1]
        slope = torch.exp(log_q, out=logits if mix.temperature == 1.0 else None).mul_(weight).scatter_add_(1, index, -weight)
    if mix.temperature != 1.0:
        log_q = logits.div_(mix.temperature).log_softmax(-1)
    del logits
    value, gradient = _GRADIENTS[mix.divergence](log_q, teacher.log_p(part, log_q, mix.temperature), mix.beta)
    gradient.mul_(mix.kl * mix.temperature)  # temperature² of the loss, 1 / temperature of the logits
    return value * mix.temperature**2, ce, gradient if slope is None else gradient.add_(slope)


class Gradients:
    """Gradients of hidden states, head weight and head bias, filled chunk by chunk; None where not wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]) -> None:
        def buffer(value: Tensor | None, yes: bool) -> Tensor | None:
            wide = torch.promote_types(weight.dtype, torch.float32)  # sums over many chunks
            return torch.zeros_like(value, dtype=wide) if yes and value is not None else None

        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight, self.bias = buffer(weight, wanted[1]), buffer(bias, wanted[2])

    def add(self, part: slice, gradient: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """A chunk's: `gradient` w.r.t. its logits [c, V], its hidden states [c, D] and the weight [V, D] in the computing dtype."""
        if self.bias is not None:
            self.bias += gradient.sum(0)
        gradient = gradient.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[part] = gradient @ weight
        if self.weight is not None and self.weight.dtype == weight.dtype:
            self.weight.addmm_(gradient.t(), hidden)
        elif self.weight is not None:
            self.weight += gradient.t() @ hidden


def logits_at_once(tensor: Tensor, vocabulary: int) -> int:
    """How many tokens' logits are held at once where `tensor` is."""
    return max(1, LOGITS_AT_ONCE.get(tensor.device.type, LOGITS_AT_ONCE_ELSEWHERE) // vocabulary)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    lowered = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64  # as autocast itself does
    return torch.get_autocast_dtype(kind) if lowered else weight.dtype


def chunks_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """A head's logits in chunks of tokens, without gradient: which tokens, their states [c, D] and the weight [V, D] as they are computed
    with, and the logits [c, V], new, in fp32 or wider."""
    dtype = _compute_dtype(weight)
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(wide)
    size = logits_at_once(weight, len(weight))
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        states = hidden[part].detach().to(dtype)
        yield part, states, weight, _logits(states, weight, bias, wide)  # held by the caller alone


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    logits = _product(states, weight.t()).to(wide)
    return logits if bias is None else logits.add_(bias)


def _sums(
    mix: Mix, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, targets: Tensor, gradients: Gradients | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The mix, its D and its CE, summed over n tokens; fills `gradients`."""
    kl_sum, ce_sum = hidden.new_zeros(2, dtype=torch.promote_types(_compute_dtype(weight), torch.float32))
    for part, states, lowered, logits in chunks_of_logits(hidden, weight, bias):
        kl, ce, gradient = _chunk(mix, logits, targets[part], teacher, part)
        del logits
        kl_sum, ce_sum = kl_sum + kl, ce_sum + ce
        if gradients is not None:
            gradients.add(part, gradient, states, lowered)
    return mix.kl * kl_sum + mix.ce * ce_sum, kl_sum, ce_sum


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype, whatever autocast would make of it."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


class _Fused(torch.autograd.Function):
    """`_sums` with the gradients made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, mix: Mix, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, targets: Tensor) -> Any:
        needed = ctx.needs_input_grad
        gradients = Gradients(hidden, weight, bias, (needed[1], needed[2], needed[3]))
        sums = _sums(mix, hidden, weight, bias, teacher, targets, gradients)
        ctx.dtypes = [None if value is None else value.dtype for value in (hidden, weight, bias)]
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, *_: Tensor) -> Any:
        # in place: a second pass through the graph is refused by autograd's version check
        scaled = [
            None if value is None else value.mul_(factor).to(dtype) for value, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, *scaled, None, None


def _from_head(mix: Mix, head: nn.Module, teacher: Teacher, targets: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = head.weight, head.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    if torch.is_grad_enabled():
        loss, kl, ce = _Fused.apply(mix, hidden, weight, bias, teacher, targets)
        return loss, kl, ce
    return _sums(mix, hidden, weight, bias, teacher, targets, None)


def head_sums(
    student: Tensor,
    teacher: Tensor | TopK,
    student_head: nn.Module,
    teacher_head: nn.Module | None,
    labels: Tensor,
    *,
    kl: float,
    ce: float,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    reduction: str = "token_mean",
) -> Sums:
    """kl · temperature² · Σ D + ce · Σ CE over target tokens, from last hidden states [B, T, D] and heads; see `Mix`.

    `teacher`: hidden states [B, T, D'], or the kept logits of the target tokens, row by row. Position t predicts
    labels[t + 1]; the labels are -100 off the targets. The student's head is linear, with or without bias; the teacher's
    is any module. Both are read inside a call of theirs, so that weights which are sharded are gathered, once.
    The gradient reaches hidden states and the student's head, in one backward pass.

    `reduction="batchmean_legacy"` is the loss of Mamba-in-Llama's published weights: the divergence counts at every
    position, prompt and padding included, and is divided by B alone. Here it comes times the number of targets, so that
    dividing by that gives the published value for these B rows.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    chosen = shifted != IGNORE  # [B, T]
    count = chosen.sum()
    legacy = reduction == "batchmean_legacy"
    factor = count.item() / len(labels) if legacy else 1.0
    counted = torch.ones_like(chosen) if legacy else chosen
    mix = Mix(kl * factor, ce, temperature, divergence, beta)
    teacher_hidden = teacher if isinstance(teacher, TopK) else teacher[counted]  # [n, D']
    sums = _in_heads(mix, student[counted], teacher_hidden, student_head, teacher_head, shifted[counted])
    return Sums(sums[0], sums[1] * factor, sums[2], count)


def _at_hand(teacher_hidden: Tensor, head: nn.Module) -> Head:
    """A teacher by its states [n, D'] and its head, whose weight is cast once where that is all that autocast would do to it."""
    if type(head) is not nn.Linear or head.bias is not None or not torch.is_autocast_enabled(teacher_hidden.device.type):
        return Head(teacher_hidden, head)
    return Head(teacher_hidden, head, head.weight.detach().to(_compute_dtype(head.weight)))


def _in_heads(
    mix: Mix, hidden: Tensor, teacher_hidden: Tensor | TopK, head: nn.Module, teacher_head: nn.Module | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`_from_head` inside the forward passes of both heads. hidden [n, D], teacher_hidden [n, D'], targets [n]."""

    def with_kept(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(teacher_hidden, TopK) and len(targets) in (0, len(teacher_hidden.values))
        return _from_head(mix, head, teacher_hidden, targets, hidden)

    def with_head(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert teacher_head is not None
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        # nothing with a gradient leaves the teacher's call: its hooks need not prepare a backward pass
        run_as_forward(
            teacher_head,
            teacher_head,
            lambda teacher_hidden: found.append(_from_head(mix, head, _at_hand(teacher_hidden, teacher_head), targets, hidden)),
            teacher_hidden,
        )
        return found[0]

    sums: tuple[Tensor, Tensor, Tensor] = run_as_forward(head, head, with_kept if isinstance(teacher_hidden, TopK) else with_head, hidden)
    return sums
