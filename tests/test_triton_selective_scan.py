"""The Triton kernels of selective_scan in the interpreter, against the sequential form in fp64.

Shapes: B batch, T time, C channels, S groups of b and c, N state width.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

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
    holes,
    needs_interpreter,
    scans_by_row,
    with_gradients,
)

from llamba.kernels.selective_scan import selective_scan

pytestmark = needs_interpreter
Named = dict[str, Tensor]


@pytest.fixture(autouse=True)
def slow_scan() -> Iterator[Callable[..., Any]]:
    """The interpreter's own scan, while the fast one runs in its place."""
    with scans_by_row() as own:
        yield own


def _inputs(B: int, T: int, C: int = 6, S: int = 2, N: int = 3) -> Named:
    made = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    return {
        "x": randn(B, T, C), "dt": randn(B, T, C).square(), "A": -randn(C, N).exp(), "b": randn(B, T, S, N), "c": randn(B, T, S, N),
        "D": randn(C), "state": randn(B, C, N),
    }  # fmt: skip


@pytest.mark.parametrize("T", [1, 3, 63, pytest.param(100, marks=pytest.mark.slow)])
def test_forward_and_backward(T: int) -> None:
    check(selective_scan, _inputs(1, T))


def test_in_fp64() -> None:
    check(selective_scan, _inputs(2, 20), relative=1e-12, dtype=torch.float64, seq_idx=documents(20))


@pytest.mark.parametrize("case", ["documents+mask", *(pytest.param(case, marks=pytest.mark.slow) for case in ("documents", "mask"))])
def test_documents_and_padding(case: str) -> None:
    options = {"seq_idx": documents(40)} if "documents" in case else {}
    check(selective_scan, _inputs(2, 40), **options, **({"mask": holes(40)} if "mask" in case else {}))


@pytest.mark.parametrize("groups", [1, 6], ids=["S=1", "S=C"])
def test_ways_to_group_channels(groups: int) -> None:
    check(selective_scan, _inputs(1, 20, S=groups))


@pytest.mark.parametrize(("C", "S", "N"), [(80, 1, 5), pytest.param(44, 2, 80, marks=pytest.mark.slow)])
def test_groups_of_several_blocks_of_channels(C: int, S: int, N: int) -> None:
    from llamba.kernels.selective_scan import triton_op

    inputs = _inputs(1, 20, C, S, N)
    assert triton_op._Tiles(inputs["x"], inputs["b"], CHUNK).parts > 1
    check(selective_scan, inputs)


def test_chunks_are_as_long_as_a_program_holds() -> None:
    check(selective_scan, _inputs(1, 70), chunk=64)


def test_without_optional_inputs() -> None:
    inputs = _inputs(1, 20)
    check(selective_scan, {name: inputs[name] for name in ("x", "dt", "A", "b", "c")})


def test_views_of_one_projection() -> None:
    """b and c as a mixer hands them over, and steps whose last axis is not dense: views into one tensor."""
    inputs = {name: tensor.float() for name, tensor in _inputs(1, 20).items()}
    joined = torch.cat([inputs[name].flatten(2) for name in "bc"], -1)
    views = {name: view.unflatten(2, (-1, 3)) for name, view in zip("bc", joined.split(6, -1), strict=True)}
    views["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    got = selective_scan(**(inputs | views), impl="triton", chunk=CHUNK)
    assert torch.equal(got[0], selective_scan(**inputs, impl="triton", chunk=CHUNK)[0])


def test_decays_of_any_strength() -> None:
    """Steps after which nothing is left stand beside some that hardly decay, and one channel never forgets."""
    inputs = _inputs(1, 40)
    inputs["dt"] = torch.where(inputs["dt"] > 1, 300.0, 0.003).double()
    inputs["A"][0] = 0
    check(selective_scan, inputs)


def test_long_memories_keep_fp32_accuracy() -> None:
    """Chunk after chunk of weak decay: the carried state is a sum over all tokens."""
    inputs = _inputs(1, 200, 2, 1)
    inputs["A"] = torch.full_like(inputs["A"], -1e-4)
    check_last_state(selective_scan, inputs)


def test_programs_in_any_order() -> None:
    check_order(selective_scan, _inputs(1, 20))


CORRUPTIONS = {
    "chunk_ends": ("row, t + 1, channel", "row, t, channel"),
    "carry_states": ("K - 1 - step if REVERSE", "step if REVERSE"),
    "scan_outputs": ("if D is not None:\n        out += value", "if D is not None:\n        out += step"),
    "scan_gradients": ("flow = decay * before * dstate", "flow = (decay * before + write) * dstate"),
}


@pytest.mark.parametrize("kernel", CORRUPTIONS)
def test_a_planted_corruption_is_caught(kernel: str, tmp_path, monkeypatch) -> None:
    from llamba.kernels.selective_scan import triton_op

    copy = corrupted(import_module("llamba.kernels.selective_scan.triton_kernels"), *CORRUPTIONS[kernel], tmp_path)
    monkeypatch.setattr(triton_op, kernel, getattr(copy, kernel))
    with pytest.raises(AssertionError, match="error"):
        check(selective_scan, _inputs(1, 20), seq_idx=documents(20)[:1])


def test_the_interpreter_s_own_scan_gives_the_same_bits(slow_scan: Callable[..., Any], monkeypatch) -> None:
    inputs = {name: tensor.float() for name, tensor in _inputs(1, 5, 2, 1, 2).items()}
    by_row = with_gradients(selective_scan, inputs, impl="triton", chunk=CHUNK)
    monkeypatch.setattr("triton.runtime.interpreter.ScanOps.generic_scan", slow_scan)
    by_entry = with_gradients(selective_scan, inputs, impl="triton", chunk=CHUNK)
    assert all(torch.equal(by_row[name], by_entry[name]) for name in by_row)


def test_states_wider_than_a_program_are_refused() -> None:
    inputs = {name: tensor.float() for name, tensor in _inputs(1, 2, N=260).items()}
    with pytest.raises(ValueError, match="selective_scan cannot run in Triton: .* hold N up to 256, got 260"):
        selective_scan(**inputs, impl="triton")
