"""The Triton kernels of ssd in the interpreter, against the sequential form in fp64.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width.
"""

import pytest
import torch
from torch import Tensor
from triton_tools import (
    CHUNK,
    check,
    check_last_state,
    check_order,
    corrupted,
    documents,
    grid_backwards,
    holes,
    needs_interpreter,
    poisoned,
    within_budget,
)

from llamba.kernels.ssd import ssd, ssd_step

pytestmark = needs_interpreter
Named = dict[str, Tensor]


def _inputs(B: int, T: int, H: int = 4, G: int = 2, P: int = 5, N: int = 3) -> Named:
    made = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    return {
        "x": randn(B, T, G, P), "a": -randn(B, T, H).square(), "b": randn(B, T, G, N), "c": randn(B, T, H, N), "dt": randn(B, T, H),
        "D": randn(H), "state": randn(B, H, P, N),
    }  # fmt: skip


@pytest.mark.parametrize("T", [1, 63, pytest.param(100, marks=pytest.mark.slow)])
def test_forward_and_backward(T: int) -> None:
    check(ssd, _inputs(1, T))


def test_in_fp64() -> None:
    check(ssd, _inputs(2, 20), relative=1e-12, dtype=torch.float64, seq_idx=documents(20))


@pytest.mark.parametrize("case", ["documents+mask", *(pytest.param(case, marks=pytest.mark.slow) for case in ("documents", "mask"))])
def test_documents_and_padding(case: str) -> None:
    options = {"seq_idx": documents(20)} if "documents" in case else {}
    check(ssd, _inputs(2, 20), **options, **({"mask": holes(20)} if "mask" in case else {}))


@pytest.mark.parametrize("heads", [(2, 2), (6, 1)], ids=["H=G", "G=1"])
def test_ways_to_group_heads(heads: tuple[int, int]) -> None:
    check(ssd, _inputs(1, 20, *heads))


@pytest.mark.slow
def test_states_wider_than_one_tile() -> None:
    check(ssd, _inputs(1, 20, 2, 1, 80, 96))


def test_without_optional_inputs() -> None:
    inputs = _inputs(1, 20)
    check(ssd, {name: inputs[name] for name in ("x", "a", "b", "c")})


def test_views_of_one_projection() -> None:
    """x, b and c as a mixer hands them over: views into one tensor."""
    inputs = {name: tensor.float() for name, tensor in _inputs(1, 20, P=4, N=4).items()}
    joined = torch.cat([inputs[name].flatten(2) for name in ("x", "b", "c")], -1)
    views = {n: v.unflatten(2, (-1, 4)) for n, v in zip("xbc", joined.split([8, 8, 16], -1), strict=True)}
    assert torch.equal(ssd(**(inputs | views), impl="triton", chunk=CHUNK)[0], ssd(**inputs, impl="triton", chunk=CHUNK)[0])


def test_decays_of_any_strength() -> None:
    inputs = _inputs(1, 40)
    inputs["a"] = torch.where(inputs["a"] < -0.5, -100.0, -0.01).double()
    check(ssd, inputs)


def test_programs_in_any_order() -> None:
    check_order(ssd, _inputs(1, 20))


CORRUPTIONS = {
    "decay_sums": ("triton_carry", "(here != before) & (t < T), 1024.0", "(here != before) & (t < T), 1.0"),
    "carry": ("triton_carry", "(w_end - w) + (r_end - r)", "(w_end - w)"),
    "outputs": ("triton_outputs", "rows >= columns", "rows > columns"),
    "head_gradients": ("triton_gradients", "first < second", "first <= second"),
    "head_gradients past the end": (
        "triton_gradients",
        "tl.store(da + (row * T + t.to(tl.int64)) * H + h, dlog + tl.load(across + (row * H + h) * K + k), mask=t < T)",
        "tl.store(da + (row * T + t.to(tl.int64)) * H + h, dlog + tl.load(across + (row * H + h) * K + k))",
    ),
    "shared_gradients": ("triton_gradients", "within(w, r, Q, True) * step[:, None]", "within(w, r, Q, True) * step[None, :]"),
}


@pytest.mark.parametrize("kernel", CORRUPTIONS)
def test_a_planted_corruption_is_caught(kernel: str, tmp_path, monkeypatch) -> None:
    from importlib import import_module

    from llamba.kernels.ssd import triton_op

    module, old, new = CORRUPTIONS[kernel]
    copy = corrupted(import_module(f"llamba.kernels.ssd.{module}"), old, new, tmp_path)
    name = kernel.split()[0]
    monkeypatch.setattr(triton_op, name, getattr(copy, name))
    with pytest.raises(AssertionError, match="error"):
        check(ssd, _inputs(1, 20), seq_idx=documents(20)[:1])


STEPS = {"mamba2": (4, 2, 5, 3, ""), "discrete": (4, 2, 5, 3, "dt"), "H = G, wide, without D": (2, 2, 40, 20, "D")}


def _check_step(H: int, G: int, P: int, N: int, without: str, dtype: torch.dtype = torch.float32, relative: float = 1e-6) -> None:
    inputs = {name: t if name in ("D", "state") else t[:, 0] for name, t in _inputs(2, 1, H, G, P, N).items() if name != without}
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    given = inputs["state"].clone()
    truth = ssd_step(**{name: tensor.double() for name, tensor in inputs.items()}, impl="torch")
    with poisoned():
        got = ssd_step(**inputs, impl="triton")
    named = (dict(zip(("y", "state"), pair, strict=True)) for pair in (got, ssd_step(**inputs, impl="torch"), truth))
    within_budget(*named, relative)
    assert torch.equal(inputs["state"], given), "the given state is left as it is"


@pytest.mark.parametrize("case", STEPS)
def test_one_token(case: str) -> None:
    _check_step(*STEPS[case])
    with grid_backwards():
        _check_step(*STEPS[case], dtype=torch.float64, relative=1e-12)


@pytest.mark.parametrize(
    "change", [("S * query[None, :]", "S * key[None, :]"), ("tl.store(new + tile, S, mask=inside)", "tl.store(new + tile, S)")]
)
def test_a_planted_corruption_of_one_token_is_caught(change: tuple[str, str], tmp_path, monkeypatch) -> None:
    from llamba.kernels.ssd import triton_step

    monkeypatch.setattr(triton_step, "advance", corrupted(triton_step, *change, tmp_path).advance)
    with pytest.raises(AssertionError, match="error"):
        _check_step(*STEPS["mamba2"])


def test_one_token_with_a_gradient_is_not_for_triton(monkeypatch) -> None:
    inputs = {name: t if name in ("D", "state") else t[:, 0] for name, t in _inputs(1, 1).items()}
    inputs["x"].requires_grad_()
    with pytest.raises(ValueError, match="its one-token step has no gradient"):
        ssd_step(**inputs, impl="triton")
    assert ssd_step(**inputs)[0].requires_grad
    with torch.no_grad():
        assert not ssd_step(**inputs, impl="triton")[0].requires_grad


def test_long_memories_keep_fp32_accuracy() -> None:
    """Chunk after chunk of weak decay: the carried state is a sum over all tokens."""
    inputs = _inputs(1, 90, 1, 1)
    inputs["a"] = torch.full_like(inputs["a"], -1e-4)
    check_last_state(ssd, inputs)


def test_forms_are_named_and_missing_ones_are_a_sentence(monkeypatch) -> None:
    inputs = {name: tensor.float() for name, tensor in _inputs(1, 4).items()}
    with pytest.raises(ValueError, match="hold P and N up to 128, got 130"):
        ssd(**{name: tensor.float() for name, tensor in _inputs(1, 4, P=130).items()}, impl="triton")
    monkeypatch.setenv("LLAMBA_KERNELS", "cuda")
    with pytest.raises(ValueError, match="LLAMBA_KERNELS must be one of auto, torch, sequential, triton.*; got 'cuda'"):
        ssd(**inputs)
    monkeypatch.setenv("LLAMBA_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="ssd cannot run in Triton: it needs tensors on CUDA, got cpu"):
        ssd(**inputs)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed: pip install triton"):
        ssd(**inputs)


def test_the_environment_chooses_and_the_choice_is_told_once(monkeypatch, caplog) -> None:
    inputs = {name: tensor.float() for name, tensor in _inputs(1, 4).items()}
    monkeypatch.setattr("llamba.kernels.choice._announced", set())
    monkeypatch.setenv("LLAMBA_KERNELS", "triton")
    with caplog.at_level("INFO", logger="llamba.kernels"):
        forced = [ssd(**inputs, chunk=CHUNK)[0] for _ in range(2)]
    assert [record.getMessage() for record in caplog.records] == ["ssd runs in triton"]
    monkeypatch.delenv("LLAMBA_KERNELS")
    assert torch.equal(forced[1], ssd(**inputs, impl="triton", chunk=CHUNK)[0])
    assert not torch.equal(forced[1], ssd(**inputs)[0])


@pytest.mark.parametrize("narrow", [("x", "b", "c"), ("b",)])
def test_products_of_bf16_are_refused_in_the_interpreter(narrow: tuple[str, ...], monkeypatch) -> None:
    """It multiplies their bits as whole numbers (triton 3.9.0), and would return numbers of 1e10; "auto" and PyTorch take them."""
    inputs = {name: tensor.bfloat16() if name in narrow else tensor.float() for name, tensor in _inputs(1, 20).items()}
    with pytest.raises(ValueError, match="ssd cannot run in Triton: Triton's interpreter multiplies bf16 matrices wrongly; pass fp32"):
        ssd(**inputs, impl="triton")
    assert ssd(**inputs)[0].isfinite().all()
    monkeypatch.setenv("LLAMBA_KERNELS", "triton")
    with pytest.raises(ValueError, match="multiplies bf16 matrices wrongly"):
        ssd(**inputs)
