"""What two models with other tokens say of the same words: a divergence between the likelihoods of aligned spans of text.

Approximate likelihood matching (Minixhofer et al. 2025, arXiv 2503.20083): each model gives a span one probability, the product of its
tokens', and with that two outcomes: this span, or any other. At temperature t the probabilities P and Q of a span are raised to 1 / t,
since a long span is else certain not to come; the loss is t · D((P, 1 - P), (Q, 1 - Q)), which for KL and large t tends to
p log(p / q) + q - p, of the surprisals p and q of teacher and student in nats.

Letters: B batch, T time, D student width, T' and D' the teacher's, n tokens, S spans.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llamba.training.losses.fused import Gradients, chunks_of_logits
from llamba.training.losses.plain import DIVERGENCES, IGNORE, Sums
from llamba.training.wrapped_forward import run_as_forward

LEAST = 1e-6  # surprisal over temperature, below which a span counts as certain


class Aligned(NamedTuple):
    """Last hidden states [B, T, D] of one model, the tokens that it read, and of each token the number of its span in its row (or -1)."""

    hidden: Tensor
    ids: Tensor
    spans: Tensor


def span_divergence(student: Tensor, teacher: Tensor, temperature: float, divergence: str, beta: float) -> Tensor:
    """Σ over spans of temperature · D between the outcomes "this span" and "any other". student, teacher [S]: log likelihoods, in nats."""

    def outcomes(likelihood: Tensor) -> Tensor:
        this = (likelihood / temperature).clamp_max(-LEAST)
        return torch.stack((this, torch.log(-torch.expm1(this))), -1)  # [S, 2]

    return DIVERGENCES[divergence](outcomes(student), outcomes(teacher), beta) * temperature


def _log_likelihoods(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Log likelihood of each target token [n]; logits in chunks."""
    parts = [
        -nn.functional.cross_entropy(logits, targets[part], reduction="none") for part, *_, logits in chunks_of_logits(hidden, weight, bias)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))


class _OfLikelihoods(torch.autograd.Function):
    """`loss_of` the tokens' log likelihoods, which gives (loss, its parts ...), with the gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, loss_of: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> Any:
        """hidden [n, D], weight [V, D], bias [V], targets [n]; what `loss_of` makes of the likelihoods [n], the gradients kept."""
        likelihoods = _log_likelihoods(hidden, weight, bias, targets).requires_grad_()
        with torch.enable_grad():
            sums = loss_of(likelihoods)
            (slopes,) = torch.autograd.grad(sums[0], likelihoods)  # [n]
        gradients = Gradients(hidden, weight, bias, (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]))
        for part, states, lowered, logits in chunks_of_logits(hidden, weight, bias):
            slope = slopes[part, None]
            gradients.add(part, logits.softmax(-1).mul_(-slope).scatter_add_(1, targets[part, None], slope), states, lowered)
        ctx.dtypes = [None if value is None else value.dtype for value in (hidden, weight, bias)]
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        sums = tuple(value.detach() for value in sums)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, *_: Tensor) -> Any:
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if value is None else value.mul_(factor).to(dtype) for value, dtype in made), None, None


def _of_spans(likelihoods: Tensor, spans: Tensor, count: int) -> Tensor:
    """Sums [S] over the tokens of each of `count` spans; that number in `spans` [n] stands for none."""
    return likelihoods.new_zeros(count + 1).index_add(0, spans, likelihoods)[:count]


def _numbered(spans: Tensor, count: int) -> Tensor:
    """Spans [B, T - 1] of the next tokens, numbered through the batch by `count` a row; the number after all of them off the spans."""
    rows = torch.arange(len(spans), device=spans.device)[:, None] * count
    return torch.where(spans >= 0, spans + rows, len(spans) * count)[:, 1:]


def span_sums(
    student: Aligned,
    teacher: Aligned,
    head: nn.Module,
    teacher_head: nn.Module,
    labels: Tensor,
    *,
    kl: float,
    ce: float,
    temperature: float,
    divergence: str,
    beta: float,
) -> Sums:
    """kl · temperature · Σ D over spans + ce · Σ CE over target tokens, with the number of targets; see the head of this file.

    `labels` [B, T] are the student's, unshifted, -100 off the targets, and hold every token of a span. The gradient reaches the student's
    hidden states and head; heads are linear, and read inside a call of theirs, so that sharded weights are gathered.
    """
    chosen = labels[:, 1:] != IGNORE  # [B, T - 1]
    count = int(student.spans.max().clamp_min(-1)) + 1  # spans of a row, at most
    total = len(labels) * count
    mine, theirs = _numbered(student.spans, count)[chosen], _numbered(teacher.spans, count)
    known = theirs < total
    present = torch.zeros(total + 1, dtype=torch.bool, device=mine.device).index_fill_(0, mine, True)[:total]  # spans that exist
    with torch.no_grad():
        said = _in_head(teacher_head, teacher.hidden[:, :-1][known], lambda states: _read(teacher_head, states, teacher.ids[:, 1:][known]))
        likely = _of_spans(said, theirs[known], total)[present].to(student.hidden.device)

    def loss_of(likelihoods: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = _of_spans(likelihoods, mine, total)[present]
        apart = span_divergence(own, likely.to(own.dtype), temperature, divergence, beta)
        cross = -likelihoods.sum()
        return kl * apart + ce * cross, apart, cross

    targets = labels[:, 1:][chosen]
    loss, apart, cross = _in_head(head, student.hidden[:, :-1][chosen], lambda states: _loss(head, states, targets, loss_of))
    return Sums(loss, apart, cross, chosen.sum())


def _in_head(head: nn.Module, hidden: Tensor, body: Callable[[Tensor], Any]) -> Any:
    return run_as_forward(head, head, body, hidden)


def _parts(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = head.weight, head.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    return weight, bias


def _read(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return _log_likelihoods(hidden, *_parts(head), targets)


def _loss(head: nn.Module, hidden: Tensor, targets: Tensor, loss_of: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    if not torch.is_grad_enabled():
        return loss_of(_read(head, hidden, targets))
    made: tuple[Tensor, ...] = _OfLikelihoods.apply(hidden, *_parts(head), targets, loss_of)
    return made
