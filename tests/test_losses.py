"""Distillation losses: definitions against fp64 token by token, the fused form against fp64 autograd, and what it holds in memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamba.training.losses import DIVERGENCES, IGNORE, Mix, TopK, distill_loss, fused, head_sums, loss_sums

B, T, D, V = 3, 9, 8, 50


def labels_of(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (B, T), generator=generator)
    return labels.masked_fill(torch.rand(B, T, generator=generator) < 0.5, IGNORE)


def divergence_of(p: Tensor, q: Tensor, divergence: str, beta: float) -> Tensor:
    """From the definitions, on probabilities."""
    if divergence == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
    return (p * (p / q).log()).sum() if divergence == "forward_kl" else (q * (q / p).log()).sum()


def oracle(student: Tensor, teacher: Tensor, labels: Tensor, t: float, divergence="forward_kl", beta=0.5, legacy=False):
    """(KL, CE) token by token, in fp64. Legacy: at every position, divided by B and times the targets."""
    kl = ce = torch.zeros((), dtype=torch.float64)
    for b, i in itertools.product(range(B), range(T)):
        target = labels[b, i + 1] if i + 1 < T else IGNORE
        if legacy or target != IGNORE:
            p, q = F.softmax(teacher[b, i].double() / t, 0), F.softmax(student[b, i].double() / t, 0)
            kl = kl + t * t * divergence_of(p, q, divergence, beta)
        if target != IGNORE:
            ce = ce - F.log_softmax(student[b, i].double(), 0)[target]
    return kl * ((labels[:, 1:] != IGNORE).sum() / B if legacy else 1), ce


def error(own: Tensor, right: Tensor) -> float:
    return ((own.double() - right).norm() / right.norm()).item()


# whole logits


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_distill_loss_is_the_definition(divergence, temperature, dtype, tolerance):
    torch.manual_seed(0)
    student, teacher, labels = 3 * torch.randn(B, T, V, dtype=dtype), 3 * torch.randn(B, T, V, dtype=dtype), labels_of()
    student.requires_grad_()
    count = int((labels[:, 1:] != IGNORE).sum())
    loss = distill_loss(
        student, teacher, labels, kl=0.7, ce=0.3, temperature=temperature, token_count=count, divergence=divergence, beta=0.3
    )
    wide = student.detach().double().requires_grad_()
    kl, ce = oracle(wide, teacher, labels, temperature, divergence, 0.3)
    expected = (0.7 * kl + 0.3 * ce) / count
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    own, right = torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, wide)[0]
    assert error(own, right) <= 10 * tolerance


def test_bf16_logits_are_summed_in_fp32():
    student, teacher, targets = torch.randn(64, V).bfloat16(), torch.randn(64, V).bfloat16(), torch.randint(V, (64,))
    kl, ce = loss_sums(Mix(1.0, 1.0), student, teacher, targets)
    assert kl.dtype == ce.dtype == torch.float32
    torch.testing.assert_close(kl, loss_sums(Mix(1.0, 1.0), student.double(), teacher.double(), targets)[0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_have_no_divergence(divergence):
    hidden, head = torch.randn(1, 6, D, requires_grad=True), nn.Linear(D, V)
    sums = head_sums(hidden, hidden.detach(), head, head, torch.zeros(1, 6).long(), kl=1.0, ce=0.0, divergence=divergence)
    assert abs(sums.kl.item()) < 1e-5 and torch.autograd.grad(sums.loss, hidden)[0].abs().max() < 1e-6


def test_jsd_tends_to_the_kls():
    """JSD / beta tends to KL(P || Q), and JSD / (1 - beta) to KL(Q || P)."""
    student, teacher, targets = torch.randn(4, V).double(), torch.randn(4, V).double(), torch.zeros(4).long()
    of = {
        name: loss_sums(Mix(1, 0, 1.0, name, beta), student, teacher, targets)[0]
        for name, beta in (("forward_kl", 0.5), ("reverse_kl", 0.5))
    }
    for beta, name in ((1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")):
        near = loss_sums(Mix(1, 0, 1.0, "jsd", beta), student, teacher, targets)[0] / min(beta, 1 - beta)
        torch.testing.assert_close(near, of[name], rtol=1e-4, atol=0)


def test_bad_settings():
    with pytest.raises(ValueError, match="divergence must be one of forward_kl, reverse_kl, jsd, got 'kl'"):
        Mix(1.0, 1.0, divergence="kl")
    with pytest.raises(ValueError, match="beta must be between 0 and 1"):
        Mix(1.0, 1.0, divergence="jsd", beta=1.0)
    with pytest.raises(ValueError, match="reduction must be one of token_mean, batchmean_legacy"):
        head_sums(torch.zeros(1, 2, D), torch.zeros(1, 2, D), nn.Linear(D, V), nn.Linear(D, V), labels_of(), kl=1, ce=1, reduction="mean")


# the fused form


def case(dtype: torch.dtype, bias: bool = True, seed: int = 0) -> tuple[Tensor, Tensor, nn.Linear, nn.Linear]:
    """Hidden states and heads; the teacher is wider than the student."""
    torch.manual_seed(seed)
    head, teacher_head = nn.Linear(D, V, bias=bias).double(), nn.Linear(2 * D, V, bias=bias).double()
    with torch.no_grad():
        head.weight.mul_(4), teacher_head.weight.mul_(4)
    hidden, guide = torch.randn(B, T, D).double(), torch.randn(B, T, 2 * D).double()
    return hidden.to(dtype).requires_grad_(), guide.to(dtype), head.to(dtype), teacher_head.to(dtype)


def trained(hidden: Tensor, head: nn.Linear) -> list[Tensor]:
    return [hidden, *head.parameters()]


@pytest.mark.parametrize("at_once", [2 * V, 10**9])
@pytest.mark.parametrize("reduction", ["token_mean", "batchmean_legacy"])
@pytest.mark.parametrize("kl, ce", [(0.7, 0.3), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fused_is_fp64_autograd(monkeypatch, divergence, temperature, kl, ce, reduction, at_once):
    """Values, and gradients of hidden states, head weight and head bias; many chunks, the last one short, or one."""
    monkeypatch.setitem(fused.LOGITS_AT_ONCE, "cpu", at_once)
    hidden, guide, head, teacher_head = case(torch.float64)
    labels = labels_of()
    settings = dict(kl=kl, ce=ce, temperature=temperature, divergence=divergence, beta=0.3, reduction=reduction)
    sums = head_sums(hidden, guide, head, teacher_head, labels, **settings)
    kl_sum, ce_sum = oracle(head(hidden), teacher_head(guide), labels, temperature, divergence, 0.3, reduction == "batchmean_legacy")
    assert sums.targets == (labels[:, 1:] != IGNORE).sum()
    expected = kl * kl_sum + ce * ce_sum
    torch.testing.assert_close((sums.loss, sums.kl, sums.ce), (expected, kl_sum, ce_sum), rtol=1e-11, atol=1e-12)
    own, right = (torch.autograd.grad(1.7 * loss, trained(hidden, head)) for loss in (sums.loss, expected))
    for mine, other in zip(own, right, strict=True):
        assert error(mine, other) < 1e-11


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fused_is_at_most_twice_as_wrong_as_pytorch(monkeypatch, divergence, temperature, bias, lowered):
    """In fp32 and in bf16 autocast, against autograd on whole logits in the same precision."""
    monkeypatch.setitem(fused.LOGITS_AT_ONCE, "cpu", 5 * V)
    labels, settings = labels_of(), dict(kl=0.7, ce=0.3, temperature=temperature, divergence=divergence, beta=0.3)
    wide, own, plain = (case(dtype, bias) for dtype in (torch.float64, torch.float32, torch.float32))
    kl, ce = oracle(wide[2](wide[0]), wide[3](wide[1]), labels, temperature, divergence, 0.3)
    right = torch.autograd.grad(0.7 * kl + 0.3 * ce, trained(wide[0], wide[2]))
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        mine = head_sums(*own, labels, **settings).loss
        theirs = distill_loss(plain[2](plain[0]), plain[3](plain[1]), labels, token_count=1, **settings)
    found = [torch.autograd.grad(loss, trained(who[0], who[2])) for loss, who in ((mine, own), (theirs, plain))]
    for fused_gradient, plain_gradient, exact in zip(*found, right, strict=True):
        assert fused_gradient.dtype == torch.float32
        assert error(fused_gradient, exact) <= 2 * error(plain_gradient, exact) + 2e-7


def test_what_is_frozen_gets_no_gradient():
    hidden, guide, head, teacher_head = case(torch.float32)
    head.requires_grad_(False)
    loss = head_sums(hidden, guide, head, teacher_head, labels_of(), kl=1.0, ce=1.0).loss
    (gradient,) = torch.autograd.grad(loss, hidden)
    hidden.requires_grad_(False), head.requires_grad_(True)
    loss = head_sums(hidden, guide, head, teacher_head, labels_of(), kl=1.0, ce=1.0).loss
    loss.backward()
    assert gradient.any() and head.weight.grad.any() and teacher_head.weight.grad is None
    with torch.no_grad():
        alone = head_sums(hidden, guide, head, teacher_head, labels_of(), kl=1.0, ce=1.0).loss
    assert alone == loss and not alone.requires_grad


def test_tied_embeddings_get_both_gradients():
    _, guide, _, teacher_head = case(torch.float64)
    embeddings, head = nn.Embedding(V, D, dtype=torch.float64), nn.Linear(D, V, bias=False, dtype=torch.float64)
    head.weight = embeddings.weight
    ids, labels = torch.randint(V, (B, T)), labels_of()
    sums = head_sums(embeddings(ids).sin(), guide, head, teacher_head, labels, kl=0.7, ce=0.3)
    whole = distill_loss(head(embeddings(ids).sin()), teacher_head(guide), labels, kl=0.7, ce=0.3, token_count=1)
    own, right = (torch.autograd.grad(loss, embeddings.weight)[0] for loss in (sums.loss, whole))
    assert error(own, right) < 1e-12


def test_a_second_backward_is_refused():
    """The gradients are scaled where they lie, so a second pass would be wrong; autograd says so."""
    hidden, guide, head, teacher_head = case(torch.float32)
    loss = head_sums(hidden, guide, head, teacher_head, labels_of(), kl=1.0, ce=1.0).loss
    loss.backward(torch.tensor(0.5), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_targets_is_zero_with_a_graph():
    hidden, head = torch.randn(B, T, D, requires_grad=True), nn.Linear(D, V)
    sums = head_sums(hidden, hidden.detach(), head, head, torch.full((B, T), IGNORE), kl=1.0, ce=1.0, temperature=1.0)
    assert sums.loss == 0 and sums.targets == 0
    assert torch.autograd.grad(sums.loss, hidden)[0].abs().max() == 0


class Largest(TorchDispatchMode):
    """The most elements that any tensor made under it has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *(one.untyped_storage().nbytes() // one.element_size() for one in tensors)])
        return made


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["token_mean", "batchmean_legacy"])
def test_no_logits_of_all_tokens_are_ever_held(monkeypatch, divergence, reduction):
    time, size = 128, 8
    monkeypatch.setitem(fused.LOGITS_AT_ONCE, "cpu", size * V)
    hidden, guide, head, teacher_head = (
        torch.randn(1, time, D, requires_grad=True),
        torch.randn(1, time, D),
        nn.Linear(D, V),
        nn.Linear(D, V),
    )
    labels = torch.randint(V, (1, time))
    with Largest() as seen:
        head_sums(
            hidden, guide, head, teacher_head, labels, kl=1.0, ce=0.5, temperature=2.0, divergence=divergence, reduction=reduction
        ).loss.backward()
    assert seen.elements <= max(size * V, time * D)
    with Largest() as seen:
        distill_loss(
            head(hidden), teacher_head(guide), labels, kl=1.0, ce=0.5, temperature=2.0, divergence=divergence, token_count=1
        ).backward()
    assert seen.elements >= time * V  # so this test can tell


# a teacher that ran before


def bucket_oracle(student: Tensor, teacher: Tensor, k: int, t: float, divergence: str, beta: float) -> Tensor:
    """The divergence over k + 1 buckets, from probabilities in fp64, row by row."""
    total = torch.zeros((), dtype=torch.float64)
    for row, other in zip(student.double(), teacher.double(), strict=True):
        p, q = F.softmax(other / t, 0), F.softmax(row / t, 0)
        best = p.argsort(descending=True)
        kept, rest = best[:k], best[k:]
        p, q = (torch.cat([values[kept], values[rest].sum()[None]][: 2 if len(rest) else 1]) for values in (p, q))
        total = total + t * t * divergence_of(p, q, divergence, beta)
    return total


@pytest.mark.parametrize("k", [1, 7, V - 1, V])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kept_logits_are_a_divergence_over_buckets(monkeypatch, divergence, temperature, k):
    monkeypatch.setitem(fused.LOGITS_AT_ONCE, "cpu", 4 * V)
    hidden, guide, head, teacher_head = case(torch.float64)
    labels = labels_of()
    chosen = labels[:, 1:] != IGNORE
    logits = teacher_head(guide)[:, :-1][chosen].detach()
    kept = TopK.of(logits, k, temperature)
    assert kept.values.shape == kept.indices.shape == (len(logits), k)
    settings = dict(kl=0.7, ce=0.3, temperature=temperature, divergence=divergence, beta=0.3)
    sums = head_sums(hidden, kept, head, None, labels, **settings)
    kl = bucket_oracle(head(hidden)[:, :-1][chosen], logits, k, temperature, divergence, 0.3)
    torch.testing.assert_close(sums.kl, kl, rtol=1e-10, atol=1e-12)
    expected = 0.7 * kl + 0.3 * oracle(head(hidden), teacher_head(guide), labels, temperature)[1]
    own, right = (torch.autograd.grad(loss, trained(hidden, head)) for loss in (sums.loss, expected))
    for mine, other in zip(own, right, strict=True):
        assert error(mine, other) < 1e-10
    if k == V:
        online = head_sums(hidden, guide, head, teacher_head, labels, **settings)
        torch.testing.assert_close(tuple(sums), tuple(online), rtol=1e-11, atol=1e-12)


def test_a_tail_far_smaller_than_rounding_keeps_its_gradient():
    """1 - (mass of the kept) would be 0 in fp32; the tail's own sum is not."""
    logits = torch.tensor([[30.0, 0.0, 0.0, 0.0]])
    kept = TopK.of(logits, 1, 1.0)
    assert kept.values.exp().item() == 1.0
    assert kept.tail.item() == pytest.approx(F.log_softmax(logits.double(), -1)[0, 1:].logsumexp(0).item(), rel=1e-6)
    log_q = torch.tensor([[40.0, 1.0, 0.0, 0.0]]).log_softmax(-1)
    assert torch.isfinite(kept.log_p(slice(0, 1), log_q, 1.0)).all()
