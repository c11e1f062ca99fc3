"""The Triton kernels of the delta rule in the interpreter, against the sequential form in fp64.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width.
"""

import pytest
import torch
from torch import Tensor
from triton_tools import check, check_order, corrupted, documents, grid_backwards, holes, needs_interpreter, poisoned, within_budget

from llamba.kernels.delta import delta_rule, delta_step

pytestmark = needs_interpreter
Named = dict[str, Tensor]
every_decay = pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])


def _inputs(B: int, T: int, channels: bool = False, H: int = 4, G: int = 2, P: int = 5, N: int = 3) -> Named:
    made = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    return {
        "x": randn(B, T, G, P), "a": -randn(B, T, H, *([N] if channels else [])).square(),
        "b": torch.nn.functional.normalize(randn(B, T, G, N), dim=-1), "c": randn(B, T, H, N), "erase": randn(B, T, H).sigmoid(),
        "write": randn(B, T, H), "state": randn(B, H, P, N),
    }  # fmt: skip


@every_decay
@pytest.mark.parametrize("T", [1, 63, pytest.param(100, marks=pytest.mark.slow)])
def test_forward_and_backward(T: int, channels: bool) -> None:
    check(delta_rule, _inputs(1, T, channels))


@every_decay
def test_in_fp64_with_documents_and_padding(channels: bool) -> None:
    inputs = _inputs(2, 20, channels)
    check(delta_rule, inputs, relative=1e-12, dtype=torch.float64, seq_idx=documents(20), mask=holes(20))


@pytest.mark.slow
def test_states_wider_than_one_tile() -> None:
    check(delta_rule, _inputs(1, 20, False, 2, 1, 80, 96))


def test_without_optional_inputs_and_with_one_group() -> None:
    inputs = _inputs(1, 20, False, 3, 1)
    check(delta_rule, {name: inputs[name] for name in ("x", "a", "b", "c", "erase")})


def test_programs_in_any_order() -> None:
    check_order(delta_rule, _inputs(1, 20))


CORRUPTIONS = {
    "invert": ("rows < i, other=0.0)  # what", "rows < i - 1, other=0.0)  # what"),
    "transfer_states": ("square = n[:, None] + n[None, :] * N", "square = n[:, None] * N + n[None, :]"),
    "transfer_states past the end": ("(end * heads + head) * P * N + tile, S, mask=inside)", "(end * heads + head) * P * N + tile, S)"),
}  # fmt: skip


@pytest.mark.parametrize("kernel", CORRUPTIONS)
def test_a_planted_corruption_is_caught(kernel: str, tmp_path, monkeypatch) -> None:
    from llamba.kernels.delta import triton_kernels, triton_op

    name = kernel.split()[0]
    monkeypatch.setattr(triton_op, name, getattr(corrupted(triton_kernels, *CORRUPTIONS[kernel], tmp_path), name))
    with pytest.raises(AssertionError, match="error"):
        check(delta_rule, _inputs(1, 20), seq_idx=documents(20)[:1])


def _check_step(channels: bool, without: str = "", dtype: torch.dtype = torch.float32, relative: float = 1e-6, P: int = 5) -> None:
    inputs = {name: t if name == "state" else t[:, 0] for name, t in _inputs(2, 1, channels, P=P).items() if name != without}
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    given = inputs["state"].clone()
    truth = delta_step(**{name: tensor.double() for name, tensor in inputs.items()}, impl="torch")
    with poisoned():
        got = delta_step(**inputs, impl="triton")
    named = (dict(zip(("y", "state"), pair, strict=True)) for pair in (got, delta_step(**inputs, impl="torch"), truth))
    within_budget(*named, relative)
    assert torch.equal(inputs["state"], given), "the given state is left as it is"


@every_decay
def test_one_token(channels: bool) -> None:
    _check_step(channels)
    _check_step(channels, "write", P=40)
    with grid_backwards():
        _check_step(channels, dtype=torch.float64, relative=1e-12)


@pytest.mark.parametrize(
    "change", [("S * query[None, :]", "S * key[None, :]"), ("tl.store(new + tile, S, mask=inside)", "tl.store(new + tile, S)")]
)
def test_a_planted_corruption_of_one_token_is_caught(change: tuple[str, str], tmp_path, monkeypatch) -> None:
    from llamba.kernels.delta import triton_kernels, triton_op

    monkeypatch.setattr(triton_op, "advance_rule", corrupted(triton_kernels, *change, tmp_path).advance_rule)
    with pytest.raises(AssertionError, match="error"):
        _check_step(False)


def test_one_token_with_a_gradient_and_wide_heads_are_not_for_triton() -> None:
    inputs = {name: t if name == "state" else t[:, 0] for name, t in _inputs(1, 1).items()}
    inputs["x"].requires_grad_()
    with pytest.raises(ValueError, match="its one-token step has no gradient"):
        delta_step(**inputs, impl="triton")
    with pytest.raises(ValueError, match="hold P and N up to 128, got 130"):
        delta_rule(**_inputs(1, 4, P=130), impl="triton")
