"""Distillation losses against plain fp64 PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llamba import losses
from llamba.losses import IGNORE, distill_loss, head_sums, kl_ce_sums

B, T, D, V = 3, 9, 8, 50


def labels_of(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (B, T), generator=generator)
    return labels.masked_fill(torch.rand(B, T, generator=generator) < 0.5, IGNORE)


def oracle(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token, in fp64, from the definition."""
    kl = ce = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        for i in range(T - 1):
            if labels[b, i + 1] != IGNORE:
                p, q = F.softmax(teacher[b, i].double() / t, 0), F.softmax(student[b, i].double() / t, 0)
                kl = kl + t * t * (p * (p / q).log()).sum()
                ce = ce - F.log_softmax(student[b, i].double(), 0)[labels[b, i + 1]]
    return kl, ce


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_distill_loss_is_the_definition(temperature, dtype, tolerance):
    torch.manual_seed(0)
    student, teacher, labels = 3 * torch.randn(B, T, V, dtype=dtype), 3 * torch.randn(B, T, V, dtype=dtype), labels_of()
    student.requires_grad_()
    count = int((labels[:, 1:] != IGNORE).sum())
    loss = distill_loss(student, teacher, labels, kl=0.7, ce=0.3, temperature=temperature, token_count=count)
    wide = student.detach().double().requires_grad_()
    kl, ce = oracle(wide, teacher, labels, temperature)
    expected = (0.7 * kl + 0.3 * ce) / count
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    own, right = torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, wide)[0]
    assert (own.double() - right).norm() <= tolerance * 10 * right.norm()


def test_bf16_logits_are_summed_in_fp32():
    student, teacher = torch.randn(64, V).bfloat16(), torch.randn(64, V).bfloat16()
    kl, ce = kl_ce_sums(student, teacher, torch.randint(V, (64,)))
    assert kl.dtype == ce.dtype == torch.float32
    torch.testing.assert_close(kl, kl_ce_sums(student.double(), teacher.double(), torch.randint(V, (64,)))[0].float(), rtol=1e-5, atol=1e-5)


def test_equal_models_have_no_divergence():
    logits = torch.randn(5, V, requires_grad=True)
    kl, _ = kl_ce_sums(logits, logits.detach(), torch.zeros(5, dtype=torch.long))
    assert abs(kl.item()) < 1e-5 and torch.autograd.grad(kl, logits)[0].abs().max() < 1e-6


@pytest.mark.parametrize("at_once", [losses._LOGITS_AT_ONCE, 4 * V])
def test_head_sums_equal_whole_logits(monkeypatch, at_once):
    """With a bias on the head, a teacher of another width, and one block or many."""
    monkeypatch.setattr(losses, "_LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    hidden, guide, labels = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, 2 * D), labels_of()
    head, teacher_head = nn.Linear(D, V), nn.Linear(2 * D, V)
    sums = head_sums(hidden, guide, head, teacher_head, labels, kl=0.7, ce=0.3, temperature=2.0)
    whole = distill_loss(head(hidden), teacher_head(guide), labels, kl=0.7, ce=0.3, temperature=2.0, token_count=1)
    assert sums.targets == (labels[:, 1:] != IGNORE).sum()
    torch.testing.assert_close(sums.loss, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(0.7 * sums.kl + 0.3 * sums.ce, whole.detach(), rtol=1e-5, atol=1e-5)
    inputs = [hidden, head.weight, head.bias]
    for own, right in zip(torch.autograd.grad(sums.loss, inputs), torch.autograd.grad(whole, inputs), strict=True):
        torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-5)


def test_no_targets_is_zero_with_a_graph():
    hidden, head = torch.randn(B, T, D, requires_grad=True), nn.Linear(D, V)
    sums = head_sums(hidden, hidden.detach(), head, head, torch.full((B, T), IGNORE), kl=1.0, ce=1.0, temperature=1.0)
    assert sums.loss == 0 and sums.targets == 0
    assert torch.autograd.grad(sums.loss, hidden)[0].abs().max() == 0
