"""The kernels against their sequential fp64 forms, and those against dense formulas.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, W conv width, C channels, S groups.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llamba.kernels.conv1d import causal_conv1d, causal_conv1d_step
from llamba.kernels.delta import delta_rule, delta_step
from llamba.kernels.selective_scan import selective_scan, selective_scan_step
from llamba.kernels.ssd import ssd, ssd_matrix, ssd_step

CHUNK, W = 16, 4
Named = dict[str, Tensor]
LENGTHS = (1, 2, 63, 100, 129)


class Op(NamedTuple):
    """A kernel with everything a test needs to run it."""

    call: Callable[..., tuple[Tensor, Tensor]]
    step: Callable[..., tuple[Tensor, Tensor]]
    inputs: Callable[[int, int], Named]
    options: dict[str, Any]
    over_time: tuple[str, ...]


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _ssd_inputs(heads: int, groups: int) -> Callable[[int, int], Named]:
    def make(B: int, T: int) -> Named:
        x, b, c = _randn(B, T, groups, 5), _randn(B, T, groups, 3), _randn(B, T, heads, 3)
        a, dt = -torch.rand(B, T, heads, dtype=torch.float64), _randn(B, T, heads)
        return {"x": x, "a": a, "b": b, "c": c, "dt": dt, "D": _randn(heads), "state": _randn(B, heads, 5, 3)}

    return make


def _delta_inputs(heads: int, groups: int, channels: bool) -> Callable[[int, int], Named]:
    def make(B: int, T: int) -> Named:
        x, b, c = _randn(B, T, groups, 5), _randn(B, T, groups, 3), _randn(B, T, heads, 3)
        a = -torch.rand(B, T, heads, *([3] if channels else []), dtype=torch.float64)
        erase, write = torch.rand(B, T, heads, dtype=torch.float64), _randn(B, T, heads)
        unit = torch.nn.functional.normalize(b, dim=-1)
        return {"x": x, "a": a, "b": unit, "c": c, "erase": erase, "write": write, "state": _randn(B, heads, 5, 3)}

    return make


def _scan_inputs(groups: int) -> Callable[[int, int], Named]:
    def make(B: int, T: int) -> Named:
        x, dt, A = _randn(B, T, 6), torch.rand(B, T, 6, dtype=torch.float64), -_randn(6, 3).exp()
        b, c = _randn(B, T, groups, 3), _randn(B, T, groups, 3)
        return {"x": x, "dt": dt, "A": A, "b": b, "c": c, "D": _randn(6), "state": _randn(B, 6, 3)}

    return make


def _conv_inputs(width: int) -> Callable[[int, int], Named]:
    return lambda B, T: {"x": _randn(B, T, 6), "weight": _randn(6, width), "bias": _randn(6), "state": _randn(B, width - 1, 6)}


OPS = {
    "ssd-H=G": Op(ssd, ssd_step, _ssd_inputs(2, 2), {"chunk": CHUNK}, ("x", "a", "b", "c", "dt")),
    "ssd-H>G": Op(ssd, ssd_step, _ssd_inputs(6, 2), {"chunk": CHUNK}, ("x", "a", "b", "c", "dt")),
    "delta-H>G": Op(delta_rule, delta_step, _delta_inputs(4, 2, False), {"chunk": CHUNK}, ("x", "a", "b", "c", "erase", "write")),
    "delta-channels": Op(delta_rule, delta_step, _delta_inputs(2, 1, True), {"chunk": CHUNK}, ("x", "a", "b", "c", "erase", "write")),
    "scan-S=1": Op(selective_scan, selective_scan_step, _scan_inputs(1), {"chunk": CHUNK}, ("x", "dt", "b", "c")),
    "scan-S=2": Op(selective_scan, selective_scan_step, _scan_inputs(2), {"chunk": CHUNK}, ("x", "dt", "b", "c")),
    "conv-W=1": Op(causal_conv1d, causal_conv1d_step, _conv_inputs(1), {"activation": "silu"}, ("x",)),
    "conv-W=4": Op(causal_conv1d, causal_conv1d_step, _conv_inputs(W), {"activation": "silu"}, ("x",)),
    "conv-linear": Op(causal_conv1d, causal_conv1d_step, _conv_inputs(W), {"activation": None}, ("x",)),
}
every_op = pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items()])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _run(op: Op, inputs: Named, **options: Any) -> tuple[Tensor, Tensor]:
    return op.call(**inputs, **(op.options | options))


def _all(op: Op, inputs: Named, **options: Any) -> list[Tensor]:
    """Both outputs, and the gradient of every input through both outputs."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    y, last = _run(op, leaves, **options)
    return [y.detach(), last.detach(), *torch.autograd.grad(_loss(y, last), list(leaves.values()))]


def _loss(y: Tensor, last: Tensor) -> Tensor:
    """A fixed random weighting of both outputs."""
    weights = torch.Generator().manual_seed(1)
    one, two = ((t * torch.randn(t.shape, generator=weights, dtype=torch.float64)).sum() for t in (y, last))
    return one + two


def _close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    error = (got.double() - want.double()).norm()
    assert error <= tolerance * want.double().norm() + 1e-30, f"relative RMS error {error / want.double().norm():.2e}"


def _all_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for g, w in zip(got, want, strict=True):
        _close(g, w, tolerance)


def _packed(T: int) -> Tensor:
    """Document numbers [2, T]: one row of several documents, one that does not start with document 0."""
    return torch.stack([torch.arange(T) * 3 // T, 1 + torch.arange(T) * 5 // (2 * T)])


def _holes(T: int) -> Tensor:
    return torch.stack([torch.arange(T) % 3 != 1, torch.arange(T) % 5 < 2])


@every_op
@pytest.mark.parametrize("case", ["plain", "documents", "mask", "documents+mask"])
@pytest.mark.parametrize("T", LENGTHS)
def test_fast_form_equals_sequential(op: Op, case: str, T: int) -> None:
    options: dict[str, Any] = {"seq_idx": _packed(T)} if "documents" in case else {}
    options |= {"mask": _holes(T)} if "mask" in case else {}
    inputs = op.inputs(2, T)
    want = _all(op, inputs, impl="sequential", **options)
    _all_close(_all(op, inputs, **options), want, 1e-10)
    single = {name: tensor.float() for name, tensor in inputs.items()}
    exact = _all(op, {name: tensor.double() for name, tensor in single.items()}, impl="sequential", **options)
    _all_close(_all(op, single, **options), exact, 2e-5)


@every_op
def test_gradcheck(op: Op) -> None:
    inputs = op.inputs(2, 7)
    docs, mask = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0] * 7]), torch.tensor([[True] * 7, [True, False] * 3 + [True]])
    options = op.options | ({"chunk": 3} if "chunk" in op.options else {})

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return op.call(**dict(zip(inputs, tensors, strict=True)), **options, seq_idx=docs, mask=mask)

    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in inputs.values()))


@every_op
@pytest.mark.parametrize("at", [1, W - 1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_split_run_continues(op: Op, at: int) -> None:
    T = 40
    inputs, docs = op.inputs(2, T), _packed(T)
    docs[1, :20] = 0
    whole, last = _run(op, inputs, seq_idx=docs)
    parts = [{name: t[:, span] if name in op.over_time else t for name, t in inputs.items()} for span in (slice(at), slice(at, T))]
    y1, state = _run(op, parts[0], seq_idx=docs[:, :at])
    y2, state = _run(op, parts[1] | {"state": state}, seq_idx=docs[:, at:] - docs[:, at - 1 : at])
    _all_close([torch.cat([y1, y2], 1), state], [whole, last], 1e-12)


@every_op
def test_steps_equal_the_whole(op: Op) -> None:
    inputs = op.inputs(2, 9)
    whole, last = _run(op, inputs)
    options = {name: value for name, value in op.options.items() if name != "chunk"}
    state, ys = inputs["state"], []
    for t in range(9):
        before = state.clone()
        now = {name: tensor[:, t] if name in op.over_time else tensor for name, tensor in inputs.items()}
        y, new = op.step(**(now | {"state": state}), **options)
        assert torch.equal(state, before)
        ys, state = [*ys, y], new
    _all_close([torch.stack(ys, 1), state], [whole, last], 1e-12)


@every_op
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_absent_tokens_change_nothing(op: Op, padding: str) -> None:
    T, real = 30, 20
    inputs = op.inputs(2, T)
    places = {"left": torch.arange(10, 30), "right": torch.arange(20), "holes": torch.arange(T)[torch.arange(T) % 3 != 1]}[padding]
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[:, places] = True
    alone = {name: t[:, places] if name in op.over_time else t for name, t in inputs.items()}
    y, last = _run(op, inputs, mask=mask)
    want, want_last = _run(op, alone)
    assert want.shape[1] == real
    _all_close([y[:, places], last], [want, want_last], 1e-12)
    assert not y[~mask].any()


@every_op
def test_absent_tokens_get_no_gradient(op: Op) -> None:
    inputs, mask = op.inputs(2, 30), _holes(30)
    grads = dict(zip(inputs, _all(op, inputs, mask=mask)[2:], strict=True))
    for name in op.over_time:
        assert not grads[name][~mask].any(), name
        assert grads[name][mask].any(), name


@every_op
def test_packed_documents_equal_separate_runs(op: Op) -> None:
    T, cut = 40, 21
    inputs = op.inputs(1, T)
    docs = (torch.arange(T) >= cut).long()[None]
    first, second = ({n: t[:, s] if n in op.over_time else t for n, t in inputs.items()} for s in (slice(cut), slice(cut, T)))
    second["state"] = torch.zeros_like(inputs["state"])
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    y, last = _run(op, leaves, seq_idx=docs)
    y1, _ = _run(op, first)
    y2, last2 = _run(op, second)
    _all_close([y.detach(), last.detach()], [torch.cat([y1, y2], 1), last2], 1e-12)
    grads = torch.autograd.grad(y[:, cut:].sum() + last.sum(), [leaves[name] for name in (*op.over_time, "state")])
    assert not grads[-1].any()
    assert not any(g[:, :cut].any() for g in grads[:-1])


@every_op
def test_half_precision_accumulates_in_fp32(op: Op) -> None:
    inputs = {name: t.bfloat16() for name, t in op.inputs(2, 100).items()}
    y, last = _run(op, inputs)
    want, want_last = _run(op, {name: t.double() for name, t in inputs.items()}, impl="sequential")
    assert y.dtype == torch.bfloat16
    _close(y, want, 4e-3)  # one rounding to bf16
    _close(last, want_last, 2e-5)


@every_op
def test_autocast_changes_nothing(op: Op) -> None:
    inputs = {name: t.float() for name, t in op.inputs(2, 50).items()}
    want = _all(op, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = _all(op, inputs)
        now = {name: t[:, 0] if name in op.over_time else t for name, t in inputs.items()}
        options = {name: value for name, value in op.options.items() if name != "chunk"}
        y, _ = op.step(**now, **options)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    _close(y, want[0][:, 0], 1e-5)


@every_op
def test_optional_inputs_default_to_nothing(op: Op) -> None:
    inputs = op.inputs(2, 40)
    neutral = {"dt": torch.ones_like, "write": torch.ones_like, "D": torch.zeros_like, "bias": torch.zeros_like, "state": torch.zeros_like}
    optional = [n for n in inputs if n in neutral and (n != "dt" or "a" in inputs)]
    full = inputs | {name: neutral[name](inputs[name]) for name in optional}
    bare = {name: t for name, t in inputs.items() if name not in optional}
    keep = [0, 1, *(2 + k for k, name in enumerate(inputs) if name not in optional)]
    want = _all(op, full, impl="sequential")
    for impl in ("sequential", "torch"):
        _all_close(_all(op, bare, impl=impl), [want[k] for k in keep], 1e-10)


@every_op
def test_gradient_of_one_input_alone(op: Op) -> None:
    inputs = op.inputs(2, 40)
    every = _all(op, inputs, impl="sequential")[2:]
    for name, want in zip(inputs, every, strict=True):
        leaf = inputs[name].clone().requires_grad_()
        (got,) = torch.autograd.grad(_loss(*_run(op, inputs | {name: leaf})), leaf)
        _close(got, want, 1e-10)


@every_op
@pytest.mark.parametrize("output", [0, 1], ids=["y", "final"])
def test_gradient_through_one_output_alone(op: Op, output: int) -> None:
    inputs, grads = op.inputs(2, 40), []
    for impl in ("sequential", "torch"):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        loss = _run(op, leaves, impl=impl)[output].square().sum()
        grads.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True))
    _all_close(grads[1], grads[0], 1e-10)


@pytest.mark.parametrize("a", [0.0, -100.0, None], ids=["none", "strong", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_ssd_decay_of_any_strength(a: float | None, dtype: torch.dtype) -> None:
    op, tolerance = OPS["ssd-H>G"], 1e-10 if dtype == torch.float64 else 2e-5
    inputs = op.inputs(2, 100)
    mixed = torch.where(torch.rand(2, 100, 6) < 0.5, -100.0, -0.01).double()
    inputs["a"] = mixed if a is None else torch.full_like(mixed, a)
    inputs = {name: t.to(dtype) for name, t in inputs.items()}
    want = _all(op, {name: t.double() for name, t in inputs.items()}, impl="sequential")
    got = _all(op, inputs, chunk=64)
    skipped = [2 + list(inputs).index(name) for name in ("a", "state")] if a == -100 else []  # nothing passes: both are noise
    _all_close([t for k, t in enumerate(got) if k not in skipped], [t for k, t in enumerate(want) if k not in skipped], tolerance)
    assert all(got[k].abs().max() < 1e-30 for k in skipped)


@pytest.mark.parametrize("rate", [0.0, -100.0], ids=["none", "strong"])
def test_scan_decay_of_any_strength(rate: float) -> None:
    op = OPS["scan-S=2"]
    inputs = {name: t.float() for name, t in op.inputs(2, 100).items()}
    inputs["A"] = torch.full_like(inputs["A"], rate)
    got, want = _all(op, inputs), _all(op, {name: t.double() for name, t in inputs.items()}, impl="sequential")
    _all_close(got, want, 2e-5)


def _decayed(a: Tensor) -> Tensor:
    """exp of the sum of a [T, ...] over j + 1 to i, as [T, T, ...] for j <= i; one product per entry."""
    T = len(a)
    out = torch.zeros(T, T, *a.shape[1:], dtype=a.dtype)
    for i in range(T):
        for j in range(i + 1):
            out[i, j] = torch.stack([torch.ones_like(a[0]), *a[j + 1 : i + 1].exp()]).prod(0)
    return out


def test_ssd_matrix_and_sequential_form_equal_the_dense_formula() -> None:
    t = _ssd_inputs(4, 2)(1, 9)
    weights = _decayed(t["a"][0])  # [T, T, H]
    keys, values = (t[name][0].repeat_interleave(2, 1) for name in ("b", "x"))  # [T, H, N], [T, H, P]
    M = torch.einsum("ihn,jhn,ijh,jh->hij", t["c"][0], keys, weights, t["dt"][0])
    _close(ssd_matrix(t["a"], t["b"], t["c"], dt=t["dt"])[0], M, 1e-12)
    entering = weights[:, 0] * t["a"][0, 0].exp()  # [T, H]
    y = torch.einsum("hij,jhp->ihp", M, values) + t["D"][:, None] * values
    y = y + torch.einsum("ihn,ih,hpn->ihp", t["c"][0], entering, t["state"][0])
    _close(ssd(**t, impl="sequential")[0][0], y, 1e-12)


@pytest.mark.parametrize("case", ["plain", "documents", "mask"])
def test_ssd_matrix_times_x_is_the_output(case: str) -> None:
    t, T = _ssd_inputs(6, 2)(2, 50), 50
    del t["D"], t["state"]
    options = {"documents": {"seq_idx": _packed(T)}, "mask": {"mask": _holes(T)}, "plain": {}}[case]
    leaves = [tensor.requires_grad_() for tensor in t.values()]
    M = ssd_matrix(t["a"], t["b"], t["c"], dt=t["dt"], **options)
    y = torch.einsum("bhij,bjhp->bihp", M, t["x"].repeat_interleave(3, 2))
    want = ssd(**t, impl="sequential", **options)[0]
    _close(y, want, 1e-12)
    _all_close(*([*torch.autograd.grad(out.square().sum(), leaves)] for out in (y, want)), 1e-10)
    M = M.detach()
    rows = slice(7, 19)
    assert torch.equal(ssd_matrix(t["a"], t["b"], t["c"], dt=t["dt"], rows=rows, **options), M[:, :, rows])


def test_scan_sequential_form_equals_the_dense_formula() -> None:
    t = _scan_inputs(2)(1, 9)
    weights = _decayed(t["dt"][0, :, :, None] * t["A"])  # [T, T, C, N]
    b, c = (t[name][0].repeat_interleave(3, 1) for name in ("b", "c"))  # [T, C, N]
    entering = weights[:, 0] * (t["dt"][0, 0, :, None] * t["A"]).exp()  # [T, C, N]
    y = torch.einsum("icn,ijcn,jcn,jc->ic", c, weights, b, (t["dt"] * t["x"])[0]) + t["D"] * t["x"][0]
    y = y + torch.einsum("icn,icn,cn->ic", c, entering, t["state"][0])
    _close(selective_scan(**t, impl="sequential")[0][0], y, 1e-12)


def test_conv_sequential_form_equals_torch_convolution() -> None:
    t = _conv_inputs(W)(2, 9)
    row = torch.cat([t["state"], t["x"]], 1).transpose(1, 2)
    want = torch.nn.functional.silu(torch.nn.functional.conv1d(row, t["weight"][:, None], t["bias"], groups=6)).transpose(1, 2)
    y, window = causal_conv1d(**t, activation="silu", impl="sequential")
    _close(y, want, 1e-12)
    assert torch.equal(window, t["x"][:, -3:])


@every_op
def test_everything_absent_keeps_the_state(op: Op) -> None:
    inputs = op.inputs(2, 20)
    y, last = _run(op, inputs, mask=torch.zeros(2, 20, dtype=torch.bool), seq_idx=_packed(20))
    assert torch.equal(last, inputs["state"]) and not y.any()


@every_op
def test_wrong_impl_is_named(op: Op) -> None:
    with pytest.raises(ValueError, match="impl must be one of auto, torch, sequential.*; got 'fast'"):
        _run(op, op.inputs(1, 3), impl="fast")


@every_op
def test_wrong_shapes_are_named(op: Op) -> None:
    inputs = op.inputs(2, 5)
    with pytest.raises(ValueError, match=r"seq_idx must have shape \[2, 5\], got \[2, 4\]"):
        _run(op, inputs, seq_idx=_packed(4))
    with pytest.raises(ValueError, match=r"mask must have shape \[2, 5\], got \[1, 5\]"):
        _run(op, inputs, mask=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="state must have shape .* got"):
        _run(op, inputs | {"state": torch.zeros(3)})


def test_wrong_arguments_of_single_kernels_are_named() -> None:
    heads, scan, conv = _ssd_inputs(2, 2)(1, 5), _scan_inputs(2)(1, 5), _conv_inputs(W)(1, 5)
    with pytest.raises(ValueError, match="H must be a multiple of G: got H = 3 query heads and G = 2"):
        ssd(**(heads | {"c": _randn(1, 5, 3, 3)}))
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        ssd(**heads, chunk=0)
    with pytest.raises(ValueError, match=r"dt must have shape \[1, 5, 2\], got \[1, 5, 1\]"):
        ssd(**(heads | {"dt": _randn(1, 5, 1)}))
    with pytest.raises(ValueError, match="C must be a multiple of S: got C = 6 channels and S = 4"):
        selective_scan(**(scan | {"b": _randn(1, 5, 4, 3)}))
    with pytest.raises(ValueError, match="activation must be 'silu' or None, got 'relu'"):
        causal_conv1d(**conv, activation="relu")
    with pytest.raises(ValueError, match=r"weight must have shape \[6, 4\], got \[5, 4\]"):
        causal_conv1d(**(conv | {"weight": _randn(5, W)}))
