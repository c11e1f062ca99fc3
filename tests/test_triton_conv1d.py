"""The Triton kernels of conv1d in the interpreter, against the sequential form in fp64.

Shapes: B batch, T time, C channels, W conv width, R slots of the ring.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_tools import corrupted, grid_backwards, needs_interpreter, poisoned, with_gradients, within_budget

from llamba.kernels.conv1d import causal_conv1d, causal_conv1d_ring, triton_kernels, triton_op

pytestmark = needs_interpreter


def _inputs(B: int, T: int, C: int = 5, W: int = 4) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    shapes = {"x": (B, T, C), "weight": (C, W), "bias": (C,), "state": (B, W - 1, C)}
    return {name: torch.randn(*shape, generator=made, dtype=torch.float64) for name, shape in shapes.items()}


def _documents(T: int) -> Tensor:
    return torch.stack([torch.arange(T) * 3 // T, 1 + torch.arange(T) * 5 // (2 * T)])


def _holes(T: int) -> Tensor:
    return torch.stack([torch.arange(T) % 3 != 1, torch.arange(T) % 5 < 2])


def _check(inputs: dict[str, Tensor], relative: float = 1e-6, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    inputs, options = {name: tensor.to(dtype) for name, tensor in inputs.items()}, {"activation": "silu"} | options
    truth = with_gradients(causal_conv1d, {n: t.double() for n, t in inputs.items()}, impl="sequential", **options)
    same = with_gradients(causal_conv1d, inputs, impl="torch", **options)
    with poisoned():
        got = with_gradients(causal_conv1d, inputs, impl="triton", **options)
    within_budget(got, same, truth, relative)


@pytest.mark.parametrize("T", [1, 3, 63, *(pytest.param(T, marks=pytest.mark.slow) for T in (100, 300))])
def test_forward_and_backward(T: int) -> None:
    _check(_inputs(1, T))


@pytest.mark.parametrize("options", [{"activation": None}, {"activation": "silu"}], ids=["linear", "silu"])
def test_documents_and_padding_in_fp64(options: dict[str, Any]) -> None:
    _check(_inputs(2, 20), relative=1e-12, dtype=torch.float64, seq_idx=_documents(20), mask=_holes(20), **options)


def test_width_1_and_many_channels() -> None:
    _check(_inputs(1, 17, C=3, W=1))
    _check(_inputs(1, 5, C=130, W=2))


def test_without_bias_and_on_a_view() -> None:
    inputs = _inputs(1, 20)
    wide = torch.cat([inputs["x"], inputs["x"]], -1).float()
    got = causal_conv1d(wide[..., :5], inputs["weight"].float(), impl="triton")[0]
    within_budget({"y": got}, {"y": got}, {"y": causal_conv1d(inputs["x"], inputs["weight"], impl="sequential")[0]}, 1e-6)


def test_programs_in_any_order() -> None:
    inputs = {name: tensor.float() for name, tensor in _inputs(1, 40, C=130, W=2).items()}
    forwards = with_gradients(causal_conv1d, inputs, impl="triton")
    with grid_backwards():
        backwards = with_gradients(causal_conv1d, inputs, impl="triton")
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


def _walk(impl: str, R: int = 8) -> list[Tensor]:
    """Rounds of 3 tokens, of which each row keeps another number; the ring wraps."""
    made = torch.Generator().manual_seed(2)
    t = {name: tensor.float() for name, tensor in _inputs(2, 1).items()}
    ring, length, outs = torch.full((2, R, 5), float("nan")), torch.zeros(2, dtype=torch.long), []
    for _ in range(6):
        x, new, kept = torch.randn(2, 3, 5, generator=made), torch.randint(0, 4, (2,), generator=made), torch.zeros(2, dtype=torch.long)
        before = ring.clone()
        with poisoned():
            y = causal_conv1d_ring(x, t["weight"], t["bias"], activation="silu", ring=ring, length=length, new=new, impl=impl)
        written = (torch.arange(R)[:, None] == (length[:, None, None] + torch.arange(3)) % R) & (torch.arange(3) < new[:, None, None])
        untouched = ~written.any(-1)
        assert torch.equal(ring[untouched].nan_to_num(7), before[untouched].nan_to_num(7)), "slots beside the new tokens are left alone"
        kept = (torch.rand(2, generator=made) * (new + 1)).long()
        outs.append(y)
        length = length + kept
    return outs


def test_ring_programs_in_any_order() -> None:
    forwards = _walk("triton")
    with grid_backwards():
        assert all(torch.equal(one, other) for one, other in zip(forwards, _walk("triton"), strict=True))


def test_ring_equals_its_torch_form_and_the_sequence() -> None:
    for got, want in zip(_walk("triton"), _walk("torch"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    t, ring = {name: tensor.float() for name, tensor in _inputs(1, 9).items()}, torch.full((1, 8, 5), float("nan"))
    options: dict[str, Any] = {"ring": ring, "new": torch.tensor([3]), "impl": "triton"}
    y = [causal_conv1d_ring(t["x"][:, k : k + 3], t["weight"], t["bias"], length=torch.tensor([k]), **options) for k in (0, 3, 6)]
    want = causal_conv1d(t["x"].double(), t["weight"].double(), t["bias"].double(), impl="sequential")[0]
    within_budget({"y": torch.cat(y, 1)}, {"y": torch.cat(y, 1)}, {"y": want}, 1e-6)
    with pytest.raises(ValueError, match="the ring needs W - 1 . T = 7 slots, got 6"):
        causal_conv1d_ring(t["x"][:, :4], t["weight"], ring=ring[:, :6], length=torch.tensor([0]), new=torch.tensor([4]))


CORRUPTIONS = {
    "convolve": ("z = z / (1.0 + tl.exp(-z))\n    tl.store(y", "tl.store(y"),
    "convolve_back": ("weight + c * W + (W - 1 - s)", "weight + c * W + s"),
    "ring_update": ("ring + (row * R + now % R)", "ring + (row * R + (now + 1) % R)"),
}


@pytest.mark.parametrize("kernel", CORRUPTIONS)
def test_a_planted_corruption_is_caught(kernel: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(triton_op, kernel, getattr(corrupted(triton_kernels, *CORRUPTIONS[kernel], tmp_path), kernel))
    with pytest.raises(AssertionError):
        if kernel == "ring_update":
            test_ring_equals_its_torch_form_and_the_sequence()
        else:
            _check(_inputs(1, 10))
