"""The fused decode kernel of Mamba-1 in the interpreter and its PyTorch form, against whole sequences in fp64.

Shapes: B batch, T time, C = H P channels, X channels of the convolution, N state width, W conv width.
"""

from typing import NamedTuple

import pytest
import torch
from test_triton_decode import only_new_slots_changed
from torch import Tensor
from torch.nn.functional import silu, softplus
from triton_tools import corrupted, grid_backwards, needs_interpreter, poisoned, rms

from llamba.kernels.conv1d import causal_conv1d
from llamba.kernels.decode import (
    Buffers,
    Cursors,
    Mamba1Weights,
    commit,
    cursors,
    mamba1_buffers,
    mamba1_steps,
    plan,
    triton_mamba1,
    triton_op,
)
from llamba.kernels.selective_scan import selective_scan

pytestmark = needs_interpreter
H, G, P, N, W, RANK, ROUND = 6, 2, 6, 3, 4, 5, 2
C, SHARED = H * P, G * P


class Kind(NamedTuple):
    """A way to repeat the shared channels and to convolve."""

    block: int = P
    X: int = SHARED
    silu: bool = True
    bias: bool = True


KINDS = {"plain": Kind(), "published": Kind(block=N, X=C), "linear": Kind(silu=False, bias=False)}


class Walk(NamedTuple):
    outputs: list[Tensor]  # of each row, [kept tokens, C]
    tokens: list[Tensor]  # of each row, those that were kept
    held: Buffers
    at: Cursors


def _weights(kind: Kind, dtype: torch.dtype) -> Mamba1Weights:
    made = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)

    bias = randn(kind.X) if kind.bias else None
    return Mamba1Weights(randn(kind.X, W), bias, randn(C), randn(C, N), randn(C), kind.block, kind.silu)


def _tokens(kind: Kind, *shape: int, seed: int = 1) -> Tensor:
    """Rows z | x | B | C | low-rank steps, then the steps: what in_proj and dt_proj give."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 2 * C + kind.X + SHARED + RANK + C, generator=made, dtype=torch.float64)


def _steps(tokens: Tensor, *arguments, impl: str) -> Tensor:
    return mamba1_steps(tokens[..., :-C], tokens[..., -C:], *arguments, impl=impl)


def _repeat(shared: Tensor, block: int) -> Tensor:
    return shared.unflatten(-1, (-1, block)).repeat_interleave(H // G, -2).flatten(-2)


def _truth(tokens: Tensor, weights: Mamba1Weights, kind: Kind) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, C] and last state of whole sequences, by the sequential forms in fp64."""
    w = Mamba1Weights(*(t.double() if isinstance(t, Tensor) else t for t in weights))
    z, raw, b, c, _, dt = tokens.double().split([C, kind.X, SHARED, C, RANK, C], -1)
    x = causal_conv1d(raw, w.conv, w.conv_bias, activation="silu" if w.silu else None, impl="sequential")[0]
    x = x if kind.X == C else _repeat(x, kind.block)
    groups = (t.unflatten(-1, (-1, N)) for t in (_repeat(b, kind.block), c))
    y, last = selective_scan(x, softplus(dt + w.dt_bias), -w.A_log.exp(), *groups, D=w.D, impl="sequential")
    return y * silu(z), last


def _empty(kind: Kind, rows: int, size: int, dtype: torch.dtype) -> tuple[Buffers, Cursors]:
    return mamba1_buffers(rows, C, SHARED, kind.X, N, W, size, dtype, "cpu"), cursors(rows, "cpu")


def _walk(kind: Kind, impl: str, dtype: torch.dtype, rounds: int = 9, keep: bool = False, rows: int = 2, size: int = ROUND) -> Walk:
    """Rounds of tokens of which each row uses and keeps numbers of its own; all that was never written is NaN."""
    made, weights, (held, at) = torch.Generator().manual_seed(6), _weights(kind, dtype), _empty(kind, rows, size, dtype)
    for buffer in held[1:]:
        buffer.fill_(float("nan"))
    walk = Walk([torch.empty(0)] * rows, [torch.empty(0)] * rows, held, at)
    for turn in range(rounds):
        tokens = _tokens(kind, rows, size, seed=turn).to(dtype)
        new = torch.full((rows,), size) if keep else torch.randint(min(turn % 3, 1), size + 1, (rows,), generator=made)
        kept = new if keep else torch.minimum(new, (torch.rand(rows, generator=made) * (new + 2)).int())
        plan(at, new, size, held.x.shape[1], keep)
        before = Buffers(*(buffer.clone() for buffer in held))
        with poisoned():
            out = _steps(tokens, weights, held, at, impl=impl)
        only_new_slots_changed(before, held, at)
        for row in range(rows):
            assert not out[row, new[row] :].any()
            walk.outputs[row] = torch.cat([walk.outputs[row].to(out), out[row, : kept[row]]])
            walk.tokens[row] = torch.cat([walk.tokens[row].to(out), tokens[row, : kept[row]]])
        commit(at, kept)
    return walk


def _check_walk(walk: Walk, weights: Mamba1Weights, kind: Kind, relative: float) -> None:
    for row, (got, tokens) in enumerate(zip(walk.outputs, walk.tokens, strict=True)):
        want, _ = _truth(tokens[None], weights, kind)
        assert rms(got.double() - want[0]) <= relative * rms(want), "output: error over budget"
        folded = int(walk.at.folded[row])
        assert folded > 0, "the walk is long enough to fold"
        state = _truth(tokens[None, :folded], weights, kind)[1][0]
        assert rms(walk.held.state[row].double() - state) <= relative * rms(state), "state: error over budget"


every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@every_kind
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rounds_with_tokens_taken_back_equal_the_sequence(impl: str, kind: Kind) -> None:
    _check_walk(_walk(kind, impl, torch.float64), _weights(kind, torch.float64), kind, 1e-12)
    if impl == "torch":
        _check_walk(_walk(kind, impl, torch.float32), _weights(kind, torch.float32), kind, 1e-5)


@pytest.mark.slow
@every_kind
def test_a_long_walk_in_fp32(kind: Kind) -> None:
    _check_walk(_walk(kind, "triton", torch.float32, rounds=60, rows=3), _weights(kind, torch.float32), kind, 1e-5)


def test_ordinary_decoding_folds_every_token() -> None:
    kind = KINDS["plain"]
    walk = _walk(kind, "triton", torch.float32, rounds=6, keep=True, rows=1, size=1)
    assert int(walk.at.folded[0]) == int(walk.at.length[0]) == 6
    _check_walk(walk, _weights(kind, torch.float32), kind, 1e-5)


@pytest.mark.parametrize("T", [1, W - 1, pytest.param(20, marks=pytest.mark.slow)])
def test_the_kernel_is_as_exact_as_its_torch_form(T: int) -> None:
    """|kernel - truth| <= 2 |PyTorch - truth| + a little, for outputs and state."""
    kind, results = KINDS["plain"], {}
    weights, tokens = _weights(kind, torch.float32), _tokens(kind, 1, T).float()
    for impl in ("torch", "triton"):
        held, at = _empty(kind, 1, T, torch.float32)
        plan(at, torch.tensor([T]), T, held.x.shape[1], keep=True)
        results[impl] = _steps(tokens, weights, held, at, impl=impl), held.state
    for name, got, same, exact in zip(("output", "state"), results["triton"], results["torch"], _truth(tokens, weights, kind), strict=True):
        error, allowed = (got.double() - exact).abs().max(), (same.double() - exact).abs().max()
        assert error <= 2 * allowed + 2e-6 * rms(exact), f"{name}: worst error {error:.2e}, PyTorch's {allowed:.2e}"


def test_one_token_and_several_give_the_same_bits() -> None:
    """The same tokens one by one, all at once, and in rounds that replay what was not folded."""
    kind, results = KINDS["plain"], []
    weights, tokens = _weights(kind, torch.float32), _tokens(kind, 1, 6).float()
    for sizes, keep in (([1] * 6, True), ([6], True), ([2, 3, 1], False)):
        (held, at), outs, start = _empty(kind, 1, 6, torch.float32), [], 0
        for size in sizes:
            new = torch.tensor([size])
            plan(at, new, size, held.x.shape[1], keep)
            outs.append(_steps(tokens[:, start : start + size], weights, held, at, impl="triton"))
            commit(at, new)
            start += size
        plan(at, torch.tensor([0]), 1, 1, keep=False)  # one slot: everything is folded now
        _steps(tokens[:, :1], weights, held, at, impl="triton")
        results.append((torch.cat(outs, 1), held.state))
    for outputs, state in results[1:]:
        assert torch.equal(outputs, results[0][0]) and torch.equal(state, results[0][1])


def test_programs_in_any_order() -> None:
    forwards = _walk(KINDS["plain"], "triton", torch.float32, rounds=3)
    with grid_backwards():
        backwards = _walk(KINDS["plain"], "triton", torch.float32, rounds=3)
    assert all(torch.equal(one, other) for one, other in zip(forwards.outputs, backwards.outputs, strict=True))


def test_the_torch_form_reads_nothing_on_the_host() -> None:
    """On the meta device every look at a number is an error: what a CUDA graph cannot hold does not happen."""
    kind = KINDS["plain"]
    weights = Mamba1Weights(*(t.to("meta") if isinstance(t, Tensor) else t for t in _weights(kind, torch.float32)))
    held, at = mamba1_buffers(2, C, SHARED, kind.X, N, W, ROUND, torch.float32, "meta"), cursors(2, "meta")
    assert _steps(_tokens(kind, 2, ROUND).float().to("meta"), weights, held, at, impl="torch").shape == (2, ROUND, C)


CORRUPTIONS = {
    "replay": ("b = tl.load(in_b, mask", "b = tl.load(in_b + SHARED, mask"),
    "fold": ("if pos + 1 == until", "if pos == until"),
    "groups": ("(channel // N * N)[:, None]", "(channel // BLOCK * N)[:, None]"),
    "owner": ("mask=real & x_first", "mask=real & (channel < X // 2)"),
}


@pytest.mark.parametrize("where", ["replay", "fold", *(pytest.param(one, marks=pytest.mark.slow) for one in ("groups", "owner"))])
def test_a_planted_corruption_is_caught(where: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(triton_op, "mamba1", corrupted(triton_mamba1, *CORRUPTIONS[where], tmp_path).mamba1)
    kind = KINDS["plain"]
    with pytest.raises(AssertionError, match="error over budget|changed"):
        _check_walk(_walk(kind, "triton", torch.float64, rows=1), _weights(kind, torch.float64), kind, 1e-12)


def test_what_does_not_fit_is_named() -> None:
    kind = KINDS["plain"]
    (held, at), weights, tokens = _empty(kind, 1, 1, torch.float32), _weights(kind, torch.float32), _tokens(kind, 1, 3).float()
    with pytest.raises(ValueError, match="dt of the tokens must have shape .1, 3, 36., got .1, 3, 41."):
        mamba1_steps(tokens[..., :-C], tokens[..., -C - RANK :], weights, held, at)
    with pytest.raises(ValueError, match=r"zxbc must have shape \[1, 3, 96\], got \[1, 3, 90\]"):
        mamba1_steps(tokens[..., :90], tokens[..., -C:], weights, held, at)
    with pytest.raises(ValueError, match="G P of the block.* block = 5"):
        _steps(tokens, weights._replace(block=5), held, at, impl="auto")
    with pytest.raises(ValueError, match="3 tokens need W - 1 . T = 6 raw slots and 2 T = 6 slots; got 4 and 4"):
        _steps(tokens, weights, held, at, impl="auto")
