"""The launches of a decoding step beside the mixers', in the interpreter and in PyTorch: attention to slots, norms, gates.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, S slots.
"""

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from triton_tools import corrupted, grid_backwards, needs_interpreter, poisoned, rms

from llamba.kernels.block import add_norm, gated
from llamba.kernels.slots import attend, place, triton_kernels, triton_op

pytestmark = needs_interpreter
both = pytest.mark.parametrize("impl", ["torch", "triton"])
G, P, S = 2, 12, 256


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def truth(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float, window: int | None) -> Tensor:
    """One token and head at a time, in fp64."""
    y = torch.zeros_like(q)
    for b, t, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        end = int(positions[b, t]) + 1
        seen = slice(0 if window is None else max(end - window, 0), end)
        g = h // (q.shape[2] // keys.shape[2])
        weights = (scale * keys[b, seen, g] @ q[b, t, h]).softmax(0)
        y[b, t, h] = weights @ values[b, seen, g]
    return y


def check_attend(impl: str, T: int, R: int, window: int | None, firsts: tuple[int, ...]) -> Tensor:
    """Rows at these places; slots that no token sees are NaN, as far as the form does not read them."""
    positions = torch.tensor(firsts)[:, None] + torch.arange(T)
    q, keys, values = randn(len(firsts), T, G * R, P), randn(len(firsts), S, G, P), randn(len(firsts), S, G, P, seed=1)
    want = truth(q, keys, values, positions, 0.3, window)
    if impl == "triton":
        for row, last in enumerate(positions[:, -1].tolist()):
            keys[row, last + 1 :] = values[row, last + 1 :] = float("nan")
    with poisoned():
        got = attend(q.float(), keys.float(), values.float(), positions, 0.3, window, impl=impl)
    assert rms(got.double() - want) <= 1e-6 * rms(want), "attention: error over budget"
    return got


@both
@pytest.mark.parametrize(("T", "R", "window", "firsts"), [(1, 1, None, (0, 64)), (5, 4, None, (63, 200)), (3, 2, 16, (5, 100))])
def test_attention_to_slots(impl: str, T: int, R: int, window: int | None, firsts: tuple[int, ...]) -> None:
    check_attend(impl, T, R, window, firsts)


def test_programs_of_attention_in_any_order() -> None:
    forwards = check_attend("triton", 2, 2, None, (100,))
    with grid_backwards():
        assert torch.equal(forwards, check_attend("triton", 2, 2, None, (100,)))


@pytest.mark.parametrize(
    ("old", "new"),
    [("slot[None, :] <= at[:, None]", "slot[None, :] < at[:, None]"), ("begin += piece * share", "begin += piece * BLOCK // 2")],
)
def test_a_planted_corruption_of_attention_is_caught(old: str, new: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(triton_op, "part", corrupted(triton_kernels, old, new, tmp_path).part)
    with pytest.raises(AssertionError, match="over budget"):
        check_attend("triton", 2, 2, None, (150,))


@both
def test_queries_and_keys_are_turned_as_transformers_does(impl: str) -> None:
    """And only the slots of the new tokens change."""
    B, T, R = 2, 3, 2
    q, k, v = randn(B, T, G * R, P).float(), randn(B, T, G, P).float(), randn(B, T, G, P, seed=1).float()
    angles = torch.cat([randn(S, P // 2).float()] * 2, -1)
    cos, sin, positions = angles.cos(), angles.sin(), torch.tensor([[0, 1, 2], [100, 101, 102]])
    keys, values = torch.full((2, B, S, G, P), 7.0).unbind()
    with poisoned():
        got = place(q, k, v, cos, sin, positions, keys, values, impl=impl)
    want = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos[positions], sin[positions])
    assert torch.allclose(got, want[0].transpose(1, 2), atol=1e-6)
    rows = torch.arange(B)[:, None]
    assert torch.allclose(keys[rows, positions], want[1].transpose(1, 2), atol=1e-6) and torch.equal(values[rows, positions], v)
    keys[rows, positions] = values[rows, positions] = 7.0
    assert bool((keys == 7).all() and (values == 7).all())


@both
@pytest.mark.parametrize("D", [32, 100])
def test_norm_and_gate(impl: str, D: int) -> None:
    x, residual, norm = randn(2, 3, D).float(), randn(2, 3, D, seed=1).float(), LlamaRMSNorm(D, eps=1e-3)
    norm.weight.data = randn(D).float()
    with poisoned(), torch.no_grad():
        total, y = add_norm(x, residual, norm.weight, norm.variance_epsilon, impl=impl)
        alone = add_norm(x, None, norm.weight, norm.variance_epsilon, impl=impl)
        assert torch.equal(total, x + residual) and torch.allclose(y, norm(x + residual), atol=1e-5)
        assert torch.equal(alone[0], x) and torch.allclose(alone[1], norm(x), atol=1e-5)
        assert torch.allclose(gated(x, residual, impl=impl), torch.nn.functional.silu(x) * residual, atol=1e-6)
    with pytest.raises(ValueError, match="weight must have shape"):
        add_norm(x, None, norm.weight[1:], 1e-3)


def test_products_of_bf16_are_refused_in_the_interpreter() -> None:
    """It multiplies their bits as whole numbers (triton 3.9.0), and would return numbers of 1e10."""
    q, keys = torch.randn(1, 1, 4, 16), torch.randn(1, 32, 2, 16)
    with pytest.raises(ValueError, match="attend cannot run in Triton: Triton's interpreter multiplies bf16 matrices wrongly; pass fp32"):
        attend(q.bfloat16(), keys.bfloat16(), keys.bfloat16(), torch.tensor([[20]]), 0.3, impl="triton")
