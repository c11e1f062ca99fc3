"""The fused decode kernel in the interpreter and its PyTorch form, against whole sequences in fp64.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, W conv width, C channels.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus
from triton_tools import corrupted, grid_backwards, needs_interpreter, poisoned, rms, within_budget

from llamba.kernels.conv1d import causal_conv1d
from llamba.kernels.decode import Buffers, Cursors, Weights, buffers, commit, cursors, mamba2_steps, plan, triton_mamba2, triton_op
from llamba.kernels.ssd import ssd
from llamba.kernels.window import turned

pytestmark = needs_interpreter
H, G, P, N, W, ROUND = 4, 2, 5, 3, 4, 2
C = G * P + G * N + H * N
KINDS = ["mamba2", "discrete_mamba2"]


def _weights(kind: str, dtype: torch.dtype) -> Weights:
    made = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)

    mamba2 = kind == "mamba2"
    return Weights(randn(C, W), randn(C), randn(H), randn(H) if mamba2 else None, randn(H), randn(H * P) if mamba2 else None, 1e-5, mamba2)


def _tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, H * P + C + H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _truth(zxbcdt: Tensor, weights: Weights, angles: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H P] and last state of whole sequences, by the sequential forms in fp64; b and c turned by `angles` [B, T, Q]."""
    w = Weights(*(t.double() if isinstance(t, Tensor) else t for t in weights))
    z, raw, dt = zxbcdt.double().split([H * P, C, H], -1)
    conv = causal_conv1d(raw, w.conv, w.conv_bias, activation="silu" if w.silu else None, impl="sequential")[0]
    x, b, c = conv.split([G * P, G * N, H * N], -1)
    step = softplus(dt + w.dt_bias)
    a, strength = (-step, None) if w.A_log is None else (-w.A_log.exp() * step, step)
    b, c = b.unflatten(-1, (G, N)), c.unflatten(-1, (H, N))
    if angles is not None:
        b, c = turned(b, *angles), turned(c, *angles)
    heads = x.unflatten(-1, (G, P)), a, b, c
    y, last = ssd(*heads, dt=strength, D=w.D, impl="sequential")
    gated = y * silu(z).unflatten(-1, (H, P))
    if w.norm is not None:
        gated = gated / (gated.square().mean(-1, keepdim=True) + w.eps).sqrt() * w.norm.view(H, P)
    return gated.flatten(-2), last


class Walk(NamedTuple):
    outputs: list[Tensor]  # of each row, [kept tokens, H P]
    tokens: list[Tensor]  # of each row, those that were kept
    held: Buffers
    at: Cursors


def _walk(kind: str, impl: str, dtype: torch.dtype, rounds: int = 9, keep: bool = False, rows: int = 2, size: int = ROUND) -> Walk:
    """Rounds of tokens of which each row uses and keeps numbers of its own; all that was never written is NaN."""
    made, weights = torch.Generator().manual_seed(6), _weights(kind, dtype)
    held, at = buffers(rows, H, G, P, N, W, size, dtype, "cpu"), cursors(rows, "cpu")
    for buffer in held[1:]:
        buffer.fill_(float("nan"))
    walk = Walk([torch.empty(0)] * rows, [torch.empty(0)] * rows, held, at)
    for turn in range(rounds):
        zxbcdt = _tokens(rows, size, seed=turn).to(dtype)
        new = torch.full((rows,), size) if keep else torch.randint(min(turn % 3, 1), size + 1, (rows,), generator=made)
        kept = new if keep else torch.minimum(new, (torch.rand(rows, generator=made) * (new + 2)).int())
        plan(at, new, size, held.x.shape[1], keep)
        before = Buffers(*(buffer.clone() for buffer in held))
        with poisoned():
            out = mamba2_steps(zxbcdt, weights, held, at, impl=impl)
        only_new_slots_changed(before, held, at)
        for row in range(rows):
            assert not out[row, new[row] :].any()
            walk.outputs[row] = torch.cat([walk.outputs[row].to(out), out[row, : kept[row]]])
            walk.tokens[row] = torch.cat([walk.tokens[row].to(out), zxbcdt[row, : kept[row]]])
        commit(at, kept)
    return walk


def only_new_slots_changed(before: Buffers, after: Buffers, at: Cursors) -> None:
    for name, old in before._asdict().items():
        now = getattr(after, name)
        for row in range(len(old)):
            same = (now[row] == old[row]) | (now[row].isnan() & old[row].isnan())
            if name == "state":
                assert same.all() or at.fold_to[row] > at.folded[row], "state changed without a fold"
            else:
                new = (int(at.length[row]) + torch.arange(int(at.new[row]))) % len(same)
                same[new] = True
                assert same.all(), f"{name} changed beside the slots of the new tokens"


def _check_walk(walk: Walk, weights: Weights, relative: float) -> None:
    for row, (got, tokens) in enumerate(zip(walk.outputs, walk.tokens, strict=True)):
        want, _ = _truth(tokens[None], weights)
        assert rms(got.double() - want[0]) <= relative * rms(want), "output: error over budget"
        folded = int(walk.at.folded[row])
        assert folded > 0, "the walk is long enough to fold"
        state = _truth(tokens[None, :folded], weights)[1][0]
        assert rms(walk.held.state[row].double() - state) <= relative * rms(state), "state: error over budget"


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_heads_that_are_turned_by_their_positions(impl: str) -> None:
    weights, tokens = _weights("mamba2", torch.float32), _tokens(2, 6)
    angle = torch.rand(2, 6, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 6
    angles = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()  # two of N = 3 coordinates
    held, at = buffers(2, H, G, P, N, W, ROUND, torch.float32, "cpu"), cursors(2, "cpu")
    got = []
    for first in (0, 2, 4):
        plan(at, torch.full((2,), 2), ROUND, held.x.shape[1], True)
        part = slice(first, first + 2)
        now = angles[0][:, part].float(), angles[1][:, part].float()
        got.append(mamba2_steps(tokens[:, part].float(), weights, held, at, impl=impl, angles=now))
        commit(at, torch.full((2,), 2))
    want, state = _truth(tokens.float(), weights, angles)
    assert rms(torch.cat(got, 1).double() - want) < 1e-5 * rms(want) and rms(held.state.double() - state) < 1e-5 * rms(state)
    with pytest.raises(ValueError, match="the dual form does not turn heads"):
        mamba2_steps(tokens[:, :2].float(), weights, held, at, form="dual", angles=now)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rounds_with_tokens_taken_back_equal_the_sequence(impl: str, kind: str) -> None:
    _check_walk(_walk(kind, impl, torch.float64), _weights(kind, torch.float64), 1e-12)
    if impl == "torch":
        _check_walk(_walk(kind, impl, torch.float32), _weights(kind, torch.float32), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_at_most_twice_those_of_torch(kind: str) -> None:
    weights, walks = _weights(kind, torch.float32), [_walk(kind, impl, torch.float32, rounds=6) for impl in ("triton", "torch")]
    made: list[dict[str, Tensor]] = [{}, {}, {}]
    for row, tokens in enumerate(walks[0].tokens):
        folded = int(walks[0].at.folded[row])
        for into, walk in zip(made, walks, strict=False):
            into |= {f"outputs of row {row}": walk.outputs[row], f"state of row {row}": walk.held.state[row]}
        made[2] |= {f"outputs of row {row}": _truth(tokens[None], weights)[0][0]}
        made[2] |= {f"state of row {row}": _truth(tokens[None, :folded], weights)[1][0]} if folded else {}
    within_budget(*made, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_walk_in_fp32(kind: str) -> None:
    _check_walk(_walk(kind, "triton", torch.float32, rounds=100, rows=3), _weights(kind, torch.float32), 1e-5)


def test_ordinary_decoding_folds_every_token() -> None:
    walk = _walk("mamba2", "triton", torch.float32, rounds=6, keep=True, rows=1, size=1)
    assert int(walk.at.folded[0]) == int(walk.at.length[0]) == 6
    _check_walk(walk, _weights("mamba2", torch.float32), 1e-5)


@pytest.mark.parametrize("kind", ["mamba2", pytest.param("discrete_mamba2", marks=pytest.mark.slow)])
def test_one_token_and_several_give_the_same_bits(kind: str) -> None:
    """The same tokens one by one, all at once, and in rounds that replay what was not folded."""
    weights, tokens = _weights(kind, torch.float32), _tokens(1, 6).float()
    results = []
    for sizes, keep in (([1] * 6, True), ([6], True), ([2, 3, 1], False)):
        held, at, outs, start = buffers(1, H, G, P, N, W, 6, torch.float32, "cpu"), cursors(1, "cpu"), [], 0
        for size in sizes:
            new = torch.tensor([size])
            plan(at, new, size, held.x.shape[1], keep)
            outs.append(mamba2_steps(tokens[:, start : start + size], weights, held, at, impl="triton"))
            commit(at, new)
            start += size
        plan(at, torch.tensor([0]), 1, 1, keep=False)  # one slot: everything is folded now
        mamba2_steps(tokens[:, :1], weights, held, at, impl="triton")
        results.append((torch.cat(outs, 1), held.state))
    for outputs, state in results[1:]:
        assert torch.equal(outputs, results[0][0]) and torch.equal(state, results[0][1])


def test_programs_in_any_order() -> None:
    forwards = _walk("mamba2", "triton", torch.float32, rounds=3)
    with grid_backwards():
        backwards = _walk("mamba2", "triton", torch.float32, rounds=3)
    assert all(torch.equal(one, other) for one, other in zip(forwards.outputs, backwards.outputs, strict=True))


def test_steps_far_below_zero_keep_their_precision() -> None:
    """softplus(-12) = 6e-6: log(1 + e^x) in fp32 would lose three digits of it."""
    weights = _weights("mamba2", torch.float32)._replace(dt_bias=torch.full((H,), -12.0))
    tokens, held, at = _tokens(1, 1).float(), buffers(1, H, G, P, N, W, 1, torch.float32, "cpu"), cursors(1, "cpu")
    plan(at, torch.tensor([1]), 1, held.x.shape[1], keep=True)
    mamba2_steps(tokens, weights, held, at, impl="triton")
    want = _truth(tokens, weights)[1]
    assert rms(held.state.double() - want) <= 1e-6 * rms(want)


CORRUPTIONS = {
    "replay": ("x, b, dt = tl.load(at_x, mask=p < P, other=0.0)", "x, b, dt = tl.load(at_x + G * P, mask=p < P, other=0.0)"),
    "fold": ("if pos + 1 == until", "if pos == until"),
    "taps": ("tl.load(conv + at * W + k", "tl.load(conv + at * W + (W - 1 - k)"),
    "owner": ("mask=p < tl.where(first, P, 0)", "mask=p < tl.where(h == 0, P, 0)"),
}


@pytest.mark.parametrize("where", ["replay", "fold", *(pytest.param(one, marks=pytest.mark.slow) for one in ("taps", "owner"))])
def test_a_planted_corruption_is_caught(where: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(triton_op, "mamba2", corrupted(triton_mamba2, *CORRUPTIONS[where], tmp_path).mamba2)
    with pytest.raises(AssertionError, match="error over budget|changed"):
        _check_walk(_walk("discrete_mamba2", "triton", torch.float64, rows=1), _weights("discrete_mamba2", torch.float64), 1e-12)


def test_what_does_not_fit_is_named() -> None:
    held, at = buffers(1, H, G, P, N, W, 1, torch.float32, "cpu"), cursors(1, "cpu")
    call: dict[str, Any] = {"weights": _weights("mamba2", torch.float32), "held": held, "at": at}
    with pytest.raises(ValueError, match=r"zxbcdt must have shape \[1, 1, 52\], got \[1, 1, 59\]"):
        mamba2_steps(torch.zeros(1, 1, 59), **call)
    with pytest.raises(ValueError, match="3 tokens need W - 1 . T = 6 raw slots and 2 T = 6 slots; got 4 and 4"):
        mamba2_steps(torch.zeros(1, 3, 52), **call)


def test_the_bench_of_several_tokens_a_launch_starts(tmp_path, capsys) -> None:
    from llamba.cli import main

    rows, picture = tmp_path / "rows.jsonl", tmp_path / "multistep.png"
    main("bench multistep --device cpu --shrink 16 --dtype float32 --repeats 1".split() + ["--out", str(rows), "--picture", str(picture)])
    assert capsys.readouterr().out.count("tokens a launch") == len(rows.read_text().splitlines()) == 6
    assert picture.stat().st_size > 1000


def test_the_bench_of_a_training_step_starts(tmp_path, capsys) -> None:
    from llamba.cli import main

    rows = tmp_path / "rows.jsonl"
    main("bench train --device cpu --shrink 32 --dtype float32 --repeats 1".split() + ["--out", str(rows)])
    assert "TFLOP/s" in capsys.readouterr().out
    assert rows.read_text().count('"bench": "train"') == 1
