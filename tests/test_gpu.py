"""The Triton kernels as compiled for the GPU at hand, against the sequential forms in fp64, and CUDA graphs: `pytest -m gpu`.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, W conv width, C channels.
"""

from collections.abc import Callable
from typing import Any

import packages
import pytest
import torch
from models import ids, student
from test_speculative import noisy, ragged
from torch import Tensor
from triton_tools import poisoned, rms, with_gradients

from llamba.kernels.block import add_norm, gated
from llamba.kernels.conv1d import causal_conv1d
from llamba.kernels.decode import (
    Buffers,
    Mamba1Weights,
    Weights,
    buffers,
    commit,
    cursors,
    mamba1_buffers,
    mamba1_steps,
    mamba2_steps,
    plan,
)
from llamba.kernels.selective_scan import selective_scan
from llamba.kernels.slots import attend, place
from llamba.kernels.ssd import ssd, ssd_step
from llamba.speculative import generate, graphs
from llamba.speculative.sampling import Sampler

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BUDGET = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative RMS error: operands of tensor cores are rounded once
Kernel = Callable[..., Tensor]
Mixer = Callable[[torch.dtype, int], tuple[Kernel, Any, Buffers, tuple[Tensor, ...]]]
every_dtype = pytest.mark.parametrize("dtype", BUDGET, ids=str)


def _randn(*shape: int, dtype: torch.dtype) -> Tensor:
    made = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=made).to("cuda", dtype)


def _check(got: dict[str, Tensor], truth: dict[str, Tensor], relative: float) -> None:
    for name, exact in truth.items():
        assert rms(got[name].double() - exact.double()) <= relative * rms(exact), name


def _exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in inputs.items()}


@every_dtype
@pytest.mark.parametrize("T", [1, 63, 100, 257])
@pytest.mark.parametrize("width", [64, 80, 128])
def test_ssd(dtype: torch.dtype, T: int, width: int) -> None:
    B, H, G = 2, 8, 2
    shapes = {"x": (B, T, G, width), "b": (B, T, G, width), "c": (B, T, H, width)}
    inputs = {name: _randn(*shape, dtype=dtype) for name, shape in shapes.items()}
    wide = {"a": (B, T, H), "dt": (B, T, H), "D": (H,), "state": (B, H, width, width)}
    inputs |= {name: _randn(*shape, dtype=torch.float32) for name, shape in wide.items()}
    inputs["a"] = -inputs["a"].abs()
    options = {"seq_idx": torch.arange(T, device="cuda").mul(3).div(T, rounding_mode="floor").expand(B, T).contiguous()}
    with poisoned():
        got = with_gradients(ssd, inputs, impl="triton", **options)
    _check(got, with_gradients(ssd, _exact(inputs), impl="sequential", **options), BUDGET[dtype])


@every_dtype
def test_one_token_of_ssd(dtype: torch.dtype) -> None:
    B, H, G, P = 3, 8, 2, 80
    shapes = {"x": (B, G, P), "b": (B, G, P), "c": (B, H, P)}
    inputs = {name: _randn(*shape, dtype=dtype) for name, shape in shapes.items()}
    wide = {"a": (B, H), "dt": (B, H), "D": (H,), "state": (B, H, P, P)}
    inputs |= {name: _randn(*shape, dtype=torch.float32) for name, shape in wide.items()}
    with poisoned(), torch.no_grad():
        got = ssd_step(**inputs, impl="triton")
        want = ssd_step(**_exact(inputs), impl="torch")
    _check(dict(zip("ys", got, strict=True)), dict(zip("ys", want, strict=True)), BUDGET[dtype])


@pytest.mark.parametrize("case", [pytest.param(case, id=case[0]) for case in packages.cases()])
def test_forms_in_other_packages(case) -> None:
    """As installed and compiled here; their products of fp32 tensors are tf32's."""
    _, op, form, inputs, options = case
    pytest.importorskip(form)
    inputs, options = ({n: v.cuda() if isinstance(v, Tensor) else v for n, v in given.items()} for given in (inputs, options))
    for name, error in packages.errors(op, form, inputs, options).items():
        assert error <= 1e-2, f"{name}: relative RMS error {error:.1e}"


@every_dtype
@pytest.mark.parametrize("T", [1, 63, 100, 257])
@pytest.mark.parametrize(("C", "S", "N"), [(64, 4, 16), (96, 2, 48), (256, 2, 128), (200, 1, 16)])
def test_selective_scan(dtype: torch.dtype, T: int, C: int, S: int, N: int) -> None:
    B = 2
    shapes = {"x": (B, T, C), "b": (B, T, S, N), "c": (B, T, S, N)}
    inputs = {name: _randn(*shape, dtype=dtype) for name, shape in shapes.items()}
    wide = {"dt": (B, T, C), "A": (C, N), "D": (C,), "state": (B, C, N)}
    inputs |= {name: _randn(*shape, dtype=torch.float32) for name, shape in wide.items()}
    inputs |= {"dt": inputs["dt"].square(), "A": -inputs["A"].exp()}
    options = {"seq_idx": torch.arange(T, device="cuda").mul(3).div(T, rounding_mode="floor").expand(B, T).contiguous()}
    with poisoned():
        got = with_gradients(selective_scan, inputs, impl="triton", **options)
    _check(got, with_gradients(selective_scan, _exact(inputs), impl="sequential", **options), BUDGET[dtype])


@every_dtype
@pytest.mark.parametrize("T", [1, 3, 100])
def test_conv1d(dtype: torch.dtype, T: int) -> None:
    inputs = {"x": _randn(2, T, 200, dtype=dtype), "state": _randn(2, 3, 200, dtype=dtype)}
    inputs |= {"weight": _randn(200, 4, dtype=torch.float32), "bias": _randn(200, dtype=torch.float32)}
    with poisoned():
        got = with_gradients(causal_conv1d, inputs, activation="silu", impl="triton")
    _check(got, with_gradients(causal_conv1d, _exact(inputs), activation="silu", impl="sequential"), BUDGET[dtype])


def _mamba2(dtype: torch.dtype, total: int) -> tuple[Kernel, Any, Buffers, tuple[Tensor, ...]]:
    """The kernel, weights, buffers, and what it takes of `total` tokens."""
    H, G, P, N, W = 8, 2, 128, 128, 4
    C = G * P + G * N + H * N
    parameters = (
        _randn(C, W, dtype=torch.float32),
        _randn(C, dtype=torch.float32),
        *(_randn(H + k, dtype=torch.float32)[:H] for k in range(3)),
    )
    weights = Weights(*parameters, _randn(H * P, dtype=torch.float32))
    tokens = _randn(1, total, H * P + C + H, dtype=torch.bfloat16).to(dtype)
    return mamba2_steps, weights, buffers(1, H, G, P, N, W, total, dtype, "cuda"), (tokens,)


def _mamba1(dtype: torch.dtype, total: int) -> tuple[Kernel, Any, Buffers, tuple[Tensor, ...]]:
    C, shared, P, N, W = 1024, 256, 128, 16, 4
    shapes = (shared, W), (shared,), (C,), (C, N), (C,)
    weights = Mamba1Weights(*(_randn(*shape, dtype=torch.float32) for shape in shapes), P)
    tokens = (_randn(1, total, width, dtype=torch.bfloat16).to(dtype) for width in (2 * C + 2 * shared + 64, C))
    return mamba1_steps, weights, mamba1_buffers(1, C, shared, shared, N, W, total, dtype, "cuda"), tuple(tokens)


def _decode(mixer: Mixer, impl: str, dtype: torch.dtype, sizes: list[int], keep: bool) -> tuple[Tensor, Tensor]:
    """The same tokens in rounds of these sizes: outputs and, once everything is folded, the state."""
    kernel, weights, held, tokens = mixer(dtype, sum(sizes))
    at, outs, start = cursors(1, "cuda"), [], 0
    for size in sizes:
        new = torch.tensor([size], device="cuda")
        plan(at, new, size, held.x.shape[1], keep)
        outs.append(kernel(*(t[:, start : start + size] for t in tokens), weights, held, at, impl=impl))
        commit(at, new)
        start += size
    plan(at, torch.zeros_like(new), 1, 1, keep=False)
    kernel(*(t[:, :1] for t in tokens), weights, held, at, impl=impl)
    return torch.cat(outs, 1), held.state


both_mixers = pytest.mark.parametrize("mixer", [_mamba2, _mamba1])


@every_dtype
@both_mixers
def test_decode_kernel_equals_its_torch_form(mixer: Mixer, dtype: torch.dtype) -> None:
    results = (_decode(mixer, impl, dtype, [1, 3, 2], False) for impl in ("triton", "torch"))
    for got, want in zip(*results, strict=True):
        assert rms(got.double() - want.double()) <= BUDGET[dtype] * rms(want)


@every_dtype
@both_mixers
def test_one_token_and_several_give_the_same_bits(mixer: Mixer, dtype: torch.dtype) -> None:
    single, state = _decode(mixer, "triton", dtype, [1] * 6, True)
    for sizes, keep in (([6], True), ([2, 3, 1], False), ([5, 1], False)):
        outputs, last = _decode(mixer, "triton", dtype, sizes, keep)
        assert torch.equal(outputs, single) and torch.equal(last, state)


def test_a_round_can_be_captured_and_replayed() -> None:
    """One CUDA graph serves every number of new and kept tokens."""
    H, G, P, N, W, T = 8, 2, 128, 128, 4, 5
    C = G * P + G * N + H * N
    ones = [torch.ones(H, device="cuda")] * 3
    weights = Weights(_randn(C, W, dtype=torch.float32), None, *ones, torch.ones(H * P, device="cuda"))
    tokens, kept = _randn(1, T, H * P + C + H, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32, device="cuda")
    static, new = torch.zeros_like(tokens), torch.zeros(1, dtype=torch.int32, device="cuda")
    graphed, at = buffers(1, H, G, P, N, W, T, torch.bfloat16, "cuda"), cursors(1, "cuda")
    plain, by = buffers(1, H, G, P, N, W, T, torch.bfloat16, "cuda"), cursors(1, "cuda")

    def one_round(tokens: Tensor, held, cursor) -> Tensor:
        plan(cursor, new, T, held.x.shape[1], keep=False)
        out = mamba2_steps(tokens, weights, held, cursor)
        commit(cursor, kept)
        return out

    one_round(static, graphed, at)  # compiles; with new = 0 nothing changes
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = one_round(static, graphed, at)
    for turn, (use, keep) in enumerate([(5, 2), (3, 3), (1, 0), (5, 5), (4, 1), (5, 5), (5, 5)]):
        new.fill_(use)
        kept.fill_(keep)
        static.copy_(tokens.roll(turn, -1))
        graph.replay()
        assert torch.equal(out, one_round(static, plain, by)), turn
    assert torch.equal(graphed.state, plain.state) and torch.equal(at.length, by.length)


@every_dtype
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("window", [None, 100])
def test_attention_to_slots(dtype: torch.dtype, T: int, window: int | None) -> None:
    B, H, G, P, S = 2, 8, 2, 128, 1024
    positions = torch.tensor([[700], [3]], device="cuda") + torch.arange(T, device="cuda")
    q, keys, values = (_randn(*shape, dtype=dtype) for shape in ((B, T, H, P), (B, S, G, P), (B, S, G + 1, P)))
    values = values[:, :, 1:].contiguous()  # other numbers than the keys
    with poisoned():
        got = attend(q, keys, values, positions, P**-0.5, window, impl="triton")
    want = attend(q.double(), keys.double(), values.double(), positions, P**-0.5, window, impl="torch")
    assert rms(got.double() - want) <= BUDGET[dtype] * rms(want)


@every_dtype
def test_what_stands_beside_the_mixers(dtype: torch.dtype) -> None:
    B, T, H, G, P, S, D = 2, 5, 8, 2, 128, 64, 1000
    q, k, v = (_randn(B, T, heads, P, dtype=dtype) for heads in (H, G, G))
    angles, positions = _randn(S, P // 2, dtype=torch.float32).repeat(1, 2), torch.arange(B * T, device="cuda").view(B, T)
    made = []
    for impl, wide in (("triton", dtype), ("torch", torch.float64)):
        keys, values = torch.zeros(2, B, S, G, P, dtype=wide, device="cuda").unbind()
        turned = place(q.to(wide), k.to(wide), v.to(wide), angles.cos().to(wide), angles.sin().to(wide), positions, keys, values, impl=impl)
        x, residual, weight = (_randn(*shape, dtype=dtype).to(wide) for shape in ((B, T, D), (B, T + 1, D), (D,)))
        made.append((turned, keys, values, *add_norm(x, residual[:, 1:], weight, 1e-5, impl=impl), gated(x, residual[:, 1:], impl=impl)))
    for got, want in zip(*made, strict=True):
        assert rms(got.double() - want) <= BUDGET[dtype] * rms(want)


@pytest.mark.parametrize(("mixer", "attention"), [("mamba2", 0.5), ("discrete_mamba2", 0.0), ("mamba1", 0.5)])
def test_decoding_in_graphs_equals_eager_decoding(mixer: str, attention: float) -> None:
    """fp32, plain and with drafts; prompts of other lengths and another number of rows use the same graphs."""
    model = student(mixer, attention=attention, dtype=torch.float32)
    draft = noisy(model).cuda()
    model.cuda()
    for lengths in ((9, 1, 2), (4, 30, 3, 17)):
        _, batch, mask = ragged(lengths)
        options = {"attention_mask": mask.cuda(), "max_new_tokens": 40, "eos_token_id": None}
        for more in ({}, {"draft": draft, "lookahead": 4}, {"draft": draft, "lookahead": "auto"}):
            want = generate(model, batch.cuda(), engine="eager", **options, **more)
            got = generate(model, batch.cuda(), engine="graphs", **options, **more)
            assert got.new == want.new
    assert len(graphs._decoders[model]) == 3, "4 rows for all: plain, 4 drafted tokens, up to 12"


def test_many_rounds_of_one_graph() -> None:
    """Hundreds of replays, sampling too: the same noise gives the same tokens as the eager loop, but for the last round."""
    model = student("mamba2", dtype=torch.float32)
    draft, prompt = noisy(model).cuda(), ids(1, 5).cuda()
    model.cuda()
    for choice in ({}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9}):
        made = []
        for engine in ("eager", "graphs"):
            options = {"engine": engine, "generator": torch.Generator().manual_seed(3), "max_new_tokens": 400, "eos_token_id": None}
            made.append(generate(model, prompt, draft=draft, lookahead=4, **options, **choice).new[0][:-5])
        assert made[0] == made[1]


def test_a_replay_neither_waits_nor_copies_to_the_host() -> None:
    model = student("mamba2", dtype=torch.float32).cuda()
    with torch.inference_mode():
        made = graphs.Decoder(model, model, 1, 256, 4, Sampler(temperature=1.0), 8)
        made.start(model, model, [ids(6).tolist()], 50, set())
        parts = made.round(4)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                made.throw(1, 4, None)
                for part in parts:
                    part()
                opened = made.post()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert opened()[0][-4] > 0
