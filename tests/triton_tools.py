"""What the tests of the Triton kernels share: the interpreter, its grid order, poisoned outputs, planted corruptions.

The interpreter runs the programs of a grid one after another: a kernel that depends on their order fails in one of the two orders.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

CHUNK = 16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # conftest.py sets it where there is no GPU
MARGIN = 64  # numbers on either side of a poisoned tensor; keeps the alignment that kernels are compiled for
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here; set TRITON_INTERPRET=1 to interpret them")


@contextlib.contextmanager
def grid_backwards() -> Iterator[None]:
    """Run the programs of every grid in reverse order."""
    from triton.runtime import interpreter

    def backwards(*args: int):
        return reversed(range(*args)) if sys._getframe(1).f_code.co_name == "__call__" else range(*args)

    interpreter.range = backwards
    try:
        yield
    finally:
        del interpreter.range


@contextlib.contextmanager
def scans_by_row() -> Iterator[Callable[..., Any]]:
    """Let the interpreter's associative scans combine whole rows: entry by entry, as its own does, a tile takes a second.

    Yields its own.
    """
    from triton.runtime.interpreter import ScanOps

    def by_row(self: Any, inputs: Any) -> list[Any]:
        values = [np.moveaxis(one.handle.data, self.axis, 0) for one in inputs]
        done = [tuple(value[0] for value in values)]
        for row in zip(*(value[1:] for value in values), strict=True):
            pair = (self.to_tensor(value, one.dtype) for value, one in zip((*done[-1], *row), [*inputs, *inputs], strict=True))
            done.append(tuple(made.handle.data for made in self.combine_fn.fn(*pair)))
        stacked = (np.moveaxis(np.stack(rows), 0, self.axis) for rows in zip(*done, strict=True))
        return [self.to_tensor(value, one.dtype) for value, one in zip(stacked, inputs, strict=True)]

    original, ScanOps.generic_scan = ScanOps.generic_scan, by_row
    try:
        yield original
    finally:
        ScanOps.generic_scan = original


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what torch.empty makes with NaN, and what lies beside it: a number that a kernel forgets to write shows, and one too many."""
    empty, wholes = torch.empty, []

    def nan(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        if not made.is_floating_point():
            return made
        wholes.append(empty(made.numel() + 2 * MARGIN, dtype=made.dtype, device=made.device).fill_(float("nan")))
        return wholes[-1][MARGIN:-MARGIN].view(made.shape)

    torch.empty = nan
    try:
        yield
    finally:
        torch.empty = empty
    for whole in wholes:
        assert whole[:MARGIN].isnan().all() and whole[-MARGIN:].isnan().all(), "error: a kernel wrote outside its tensor"


def corrupted(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A copy of `module` with `old` replaced once by `new` in its source."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__file__}"
    path = folder / "corrupted.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(module.__package__ + ".corrupted", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def within_budget(got: dict[str, Tensor], same: dict[str, Tensor], truth: dict[str, Tensor], relative: float) -> None:
    """|got - truth| <= 2 |PyTorch in the same dtype - truth| + a little, worst entry; and the relative RMS error of each tensor."""
    for name, exact in truth.items():
        if not exact.numel():
            continue
        assert got[name].shape == exact.shape, name
        error, allowed = (got[name].double() - exact).abs().max(), (same[name].double() - exact).abs().max()
        scale = rms(exact)
        assert error <= 2 * allowed + relative * scale + 1e-30, f"{name}: worst error {error:.2e}, PyTorch's {allowed:.2e}"
        assert rms(got[name].double() - exact) <= relative * scale + 1e-30, f"{name}: relative RMS error over {relative}"


def with_gradients(call: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Both outputs and, of a fixed random weighting of both, the gradient of every input."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    y, last = call(**leaves, **options)
    made = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=made, dtype=torch.float64).to(t)).sum() for t in (y, last))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y.detach(), "last": last.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def documents(T: int) -> Tensor:
    """[2, T]: a row of several documents, and one whose first is not number 0."""
    return torch.stack([torch.arange(T) * 3 // T, 1 + torch.arange(T) * 5 // (2 * T)])


def holes(T: int) -> Tensor:
    """A mask [2, T] with absent tokens in the midst and one with runs of them."""
    return torch.stack([torch.arange(T) % 3 != 1, torch.arange(T) % 5 < 2])


def check(
    operator: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor], relative: float = 2e-6, dtype: torch.dtype = torch.float32,
    chunk: int = CHUNK, **options: Any,
) -> None:  # fmt: skip
    """Outputs and gradients of the operator in Triton against its sequential form in fp64."""
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    truth = with_gradients(operator, {name: tensor.double() for name, tensor in inputs.items()}, impl="sequential", **options)
    same = with_gradients(operator, inputs, impl="torch", chunk=chunk, **options)
    with poisoned():
        got = with_gradients(operator, inputs, impl="triton", chunk=chunk, **options)
    within_budget(got, same, truth, relative)


def check_order(operator: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor]) -> None:
    """The same bits, in whatever order the programs run."""
    inputs = {name: tensor.float() for name, tensor in inputs.items()}
    options: dict[str, Any] = {"impl": "triton", "chunk": CHUNK, "seq_idx": documents(inputs["x"].shape[1])[:1]}
    forwards = with_gradients(operator, inputs, **options)
    with grid_backwards():
        backwards = with_gradients(operator, inputs, **options)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


def check_last_state(operator: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor]) -> None:
    """The state after the last token keeps fp32's accuracy."""
    inputs = {name: tensor.float() for name, tensor in inputs.items()}
    got = operator(**inputs, impl="triton", chunk=CHUNK)[1]
    want = operator(**{name: tensor.double() for name, tensor in inputs.items()}, impl="sequential")[1]
    assert rms(got.double() - want) <= 1e-6 * rms(want)
