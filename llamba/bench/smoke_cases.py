"""What `llamba bench smoke` checks: every Triton kernel on inputs of a fixed seed, against PyTorch.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width, W conv width, C channels. Kernels with a gradient
and single steps are held to fp64; rounds of decoding, which round what they keep, to the same numbers in PyTorch.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llamba.kernels.block import add_norm, gated
from llamba.kernels.conv1d import causal_conv1d, causal_conv1d_ring
from llamba.kernels.decode import (
    Mamba1Weights,
    Weights,
    buffers,
    commit,
    cursors,
    mamba1_buffers,
    mamba1_steps,
    mamba2_steps,
    plan,
)  # fmt: skip
from llamba.kernels.delta import delta_rule, delta_step
from llamba.kernels.mamba3 import mamba3_scan
from llamba.kernels.selective_scan import selective_scan
from llamba.kernels.slots import attend, place
from llamba.kernels.ssd import ssd, ssd_step
from llamba.kernels.window import Held, Rest, Sight, window_steps

Made = dict[str, Tensor]
Case = Callable[[], dict[str, float]]
ROUND, W = 5, 4  # tokens of a round of decoding; conv width


class Size(NamedTuple):
    """Shapes of the checks: small where kernels are interpreted."""

    B: int
    T: int
    H: int
    G: int
    P: int
    C: int


SMALL, FULL = Size(1, 20, 2, 1, 16, 32), Size(2, 257, 8, 2, 128, 256)
N = 16  # states of a channel of the selective scan


def _randn(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str) -> Made:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}


def _ssd_inputs(B: int, T: int, H: int, G: int, P: int, dtype: torch.dtype, device: str) -> Made:
    inputs = _randn({"x": (B, T, G, P), "b": (B, T, G, P), "c": (B, T, H, P)}, dtype, device)
    wide = _randn({"a": (B, T, H), "dt": (B, T, H), "D": (H,), "state": (B, H, P, P)}, torch.float32, device)
    return inputs | wide | {"a": -wide["a"].abs(), "dt": wide["dt"].abs()}


def _scan_inputs(B: int, T: int, C: int, N: int, dtype: torch.dtype, device: str) -> Made:
    inputs = _randn({"x": (B, T, C), "b": (B, T, C // N, N), "c": (B, T, C // N, N)}, dtype, device)
    wide = _randn({"dt": (B, T, C), "A": (C, N), "D": (C,), "state": (B, C, N)}, torch.float32, device)
    return inputs | wide | {"dt": wide["dt"].square(), "A": -wide["A"].exp()}


def _conv_inputs(B: int, T: int, C: int, dtype: torch.dtype, device: str) -> Made:
    return _randn({"x": (B, T, C), "state": (B, 3, C)}, dtype, device) | _randn({"weight": (C, 4), "bias": (C,)}, torch.float32, device)


def _outputs(call: Callable[..., Any], inputs: Made, gradients: bool) -> Made:
    """A call's outputs and, of their sum with fixed weights, the gradient of every input."""
    leaves = {name: value.detach().clone().requires_grad_(gradients) for name, value in inputs.items()}
    out = call(**leaves)
    outs = out if isinstance(out, tuple) else (out,)
    made = {f"output {place}": value.detach() for place, value in enumerate(outs)}
    if gradients:
        loss = sum((value.double() * _slopes(value)).sum() for value in outs)
        made |= dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return made


def _slopes(value: Tensor) -> Tensor:
    """From -1 to 1, in numbers that bf16 has: a gradient that is rounded is no kernel's error."""
    return torch.linspace(-1, 1, value.numel(), device=value.device).bfloat16().double().view(value.shape)


def _errors(call: Callable[..., Any], inputs: Made, gradients: bool) -> dict[str, float]:
    """Relative RMS error of each output and gradient in Triton, against PyTorch in fp64."""
    got = _outputs(partial(call, impl="triton"), inputs, gradients)
    want = _outputs(partial(call, impl="torch"), {name: value.double() for name, value in inputs.items()}, gradients)
    return {
        name: ((got[name].double() - exact).square().mean() / exact.square().mean().clamp_min(1e-30)).sqrt().item()
        for name, exact in want.items()
    }


def _both(run: Callable[[str], Made]) -> dict[str, float]:
    """Relative RMS error of what a call gives in Triton, against what it gives in PyTorch."""
    made, exact = run("triton"), run("torch")
    return {
        name: ((made[name].double() - want.double()).square().mean() / want.double().square().mean().clamp_min(1e-30)).sqrt().item()
        for name, want in exact.items()
    }


def _rounds(read: Callable[[Any, int], Made], device: str) -> Made:
    """Two rounds of decoding, of which the first keeps three tokens: the second reads what it held. `read` gets cursors and a round."""
    at = cursors(1, device)
    made: Made = {}
    for number, kept in enumerate((3, ROUND)):
        plan(at, torch.tensor([ROUND], device=device), ROUND, 4 * ROUND, False)
        made |= {f"{name}, round {number}": value for name, value in read(at, number).items()}
        commit(at, torch.tensor([kept], device=device))
    return made


def _mamba2(dtype: torch.dtype, device: str, size: Size, impl: str, form: str, turned: bool) -> Made:
    _, _, H, G, P, _ = size
    C = 2 * G * P + H * P
    wide = _randn({"conv": (C, W), "bias": (C,), "norm": (H * P,), "angle": (2, 1, ROUND, P // 2)}, torch.float32, device)
    ones = torch.ones(H, device=device)
    weights = Weights(wide["conv"], wide["bias"], ones, ones, ones, wide["norm"])
    tokens = _randn({"z": (2, 1, ROUND, H * P + C + H)}, dtype, device)["z"]
    angles = [torch.cat((part, part), -1).to(dtype) for part in (wide["angle"].cos(), wide["angle"].sin())]
    held = buffers(1, H, G, P, P, W, ROUND, dtype, device)

    def read(at: Any, number: int) -> Made:
        turns = (angles[0][number], angles[1][number]) if turned else None
        return {"y": mamba2_steps(tokens[number], weights, held, at, impl, form, angles=turns)}

    return _rounds(read, device)


def _mamba1(dtype: torch.dtype, device: str, size: Size, impl: str) -> Made:
    C, shared = size.H * size.P, size.G * size.P
    shapes = {"conv": (shared, W), "conv_bias": (shared,), "dt_bias": (C,), "A_log": (C, N), "D": (C,)}
    wide = _randn(shapes, torch.float32, device)
    weights = Mamba1Weights(wide["conv"], wide["conv_bias"], wide["dt_bias"], wide["A_log"], wide["D"], size.P)
    tokens = _randn({"z": (2, 1, ROUND, 2 * C + 2 * shared), "dt": (2, 1, ROUND, C)}, dtype, device)
    held = mamba1_buffers(1, C, shared, shared, N, W, ROUND, dtype, device)
    return _rounds(lambda at, number: {"y": mamba1_steps(tokens["z"][number], tokens["dt"][number], weights, held, at, impl)}, device)


def _window(dtype: torch.dtype, device: str, size: Size, impl: str) -> Made:
    _, _, H, G, P, _ = size
    sight = Sight(window=4, sinks=2)
    keys, values = torch.zeros(2, 1, G, sight.sinks + sight.window + 2 * ROUND, P, dtype=dtype, device=device).unbind()
    given = _randn({"heads": (2, 1, ROUND, 2 * G + H, P), "y": (2, 1, ROUND, H * P), "angle": (2, 1, ROUND, P // 2)}, dtype, device)
    scores = _randn({"scores": (2, 1, ROUND, H)}, dtype, device)["scores"]
    rest = Rest(*_randn({"bias": (H,), "growth": (H,), "share": (H * P,)}, torch.float32, device).values())
    total, summed = torch.zeros(1, G, P, dtype=torch.float32, device=device), torch.zeros(1, G, dtype=torch.long, device=device)
    held = Held(keys, values, total, summed)
    angle = torch.cat((given["angle"], given["angle"]), -1)

    def read(at: Any, n: int) -> Made:
        turns = angle[n].cos(), angle[n].sin()
        y = window_steps(given["heads"][n], scores[n], given["y"][n], rest, turns, held, at, sight, P**-0.5, impl)
        return {"y": y, **{name: part.clone() for name, part in held._asdict().items() if name != "summed"}}

    return _rounds(read, device)


def _ring(dtype: torch.dtype, device: str, size: Size, impl: str) -> Made:
    x = _randn({"x": (2, 1, ROUND, size.C)}, dtype, device)["x"]
    parameters, ring = (
        _randn({"weight": (size.C, W), "bias": (size.C,)}, torch.float32, device),
        torch.zeros(1, 8, size.C, dtype=dtype, device=device),
    )

    def read(at: Any, number: int) -> Made:
        y = causal_conv1d_ring(x[number], **parameters, activation="silu", ring=ring, length=at.length, new=at.new, impl=impl)
        return {"y": y, "ring": ring.clone()}

    return _rounds(read, device)


def _slots(dtype: torch.dtype, device: str, size: Size, impl: str) -> Made:
    """Keys and values placed, then read."""
    _, _, H, G, P, _ = size
    made = _randn(
        {"q": (1, ROUND, H, P), "k": (1, ROUND, G, P), "v": (1, ROUND, G, P), "held": (2, 1, 64, G, P), "angle": (64, P)}, dtype, device
    )
    keys, values = (part.clone() for part in made["held"])
    positions = torch.arange(ROUND, device=device)[None] + 30
    q = place(made["q"], made["k"], made["v"], made["angle"].cos(), made["angle"].sin(), positions, keys, values, impl)
    return {"q": q, "keys": keys, "values": values, "y": attend(q, keys, values, positions, P**-0.5, None, impl=impl)}


def _delta_inputs(size: Size, by_channel: bool, dtype: torch.dtype, device: str) -> Made:
    """Keys of length 1, decays below 1, and gates between 0 and 1."""
    B, T, H, _, P, _ = size
    inputs = _ssd_inputs(*size[:5], dtype, device)
    wide = _randn({"erase": (B, T, H), "write": (B, T, H), "decays": (B, T, H, P)}, torch.float32, device)
    a = (wide["decays"] if by_channel else inputs["a"]).abs() * -0.1
    named = {"x": inputs["x"], "a": a, "b": normalize(inputs["b"].float(), dim=-1).to(dtype), "c": inputs["c"], "state": inputs["state"]}
    return named | {name: wide[name].sigmoid() for name in ("erase", "write")}


def _mamba3_inputs(size: Size, dtype: torch.dtype, device: str) -> Made:
    B, T, H, G, P, _ = size
    inputs = _randn({"x": (B, T, G, P), "b": (B, T, H, P), "c": (B, T, H, P)}, dtype, device)
    wide = _randn({"a": (B, T, H), "turn": (B, T, H, P // 2), "dt": (B, T, H), "now": (B, T, H), "D": (H,)}, torch.float32, device)
    return inputs | wide | {"a": -wide["a"].abs(), "dt": wide["dt"].abs(), "now": wide["now"].sigmoid()}


def _first(inputs: Made) -> Made:
    """The first token of each row, without the time axis; what has none stays."""
    return {name: value if name in ("D", "state") else value[:, 0].contiguous() for name, value in inputs.items()}


def _captured(device: str) -> dict[str, float]:
    """A graph of one SSD step that is captured and replayed; the error of what the replay writes."""
    inputs = {name: value[:, 0] if value.ndim > 3 or name in ("a", "dt") else value for name, value in
              _ssd_inputs(1, 1, 8, 2, 128, torch.float32, device).items() if name != "state"}  # fmt: skip
    state = torch.zeros(1, 8, 128, 128, device=device)
    x, a, b, c, dt, D = (inputs[name] for name in ("x", "a", "b", "c", "dt", "D"))
    run = partial(ssd_step, x, a, b, c, dt=dt, D=D, state=state)
    with torch.no_grad():
        want = run()[0].clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()[0]
        graph.replay()
        torch.cuda.synchronize()
    return {"y": ((out - want).square().mean() / want.square().mean()).sqrt().item()}


def cases(dtype: torch.dtype, device: str) -> dict[str, Case]:
    """What is checked, by name: a call that gives relative errors."""
    size = SMALL if device == "cpu" else FULL
    B, T, H, G, P, C = size
    given, here = _ssd_inputs(B, T, H, G, P, dtype, device), (dtype, device, size)
    deltas = {kind: _delta_inputs(size, by_channel, dtype, device) for kind, by_channel in (("head", False), ("channel", True))}
    mamba3 = _mamba3_inputs(size, dtype, device)
    turn = mamba3.pop("turn")  # its gradient is PyTorch's, and a sum of what bf16 has rounded
    hidden = _randn({"x": (1, 5, C), "residual": (1, 5, C), "weight": (C,)}, dtype, device)
    conv = partial(causal_conv1d, activation="silu")
    made: dict[str, Case] = {
        "ssd": partial(_errors, ssd, given, True),
        "ssd, one token": partial(_errors, ssd_step, _first(given), False),
        "mamba-3": partial(_errors, partial(mamba3_scan, turn=turn), mamba3, True),
        "selective scan": partial(_errors, selective_scan, _scan_inputs(B, T, C, N, dtype, device), True),
        "convolution": partial(_errors, conv, _conv_inputs(B, T, C, dtype, device), True),
        "sum and norm": partial(_errors, partial(add_norm, eps=1e-5), hidden, False),
        "gate": partial(_errors, gated, _randn({"gate": (1, 5, C), "up": (1, 5, C)}, dtype, device), False),
    }
    for kind, inputs in deltas.items():
        made[f"delta by {kind}"] = partial(_errors, delta_rule, inputs, True)
        made[f"delta by {kind}, one token"] = partial(_errors, delta_step, _first(inputs), False)
    rounds: dict[str, Callable[[str], Made]] = {
        "mamba-2 round": partial(_mamba2, *here, form="recurrent", turned=False),
        "mamba-2 round, turned": partial(_mamba2, *here, form="recurrent", turned=True),
        "mamba-2 round, dual": partial(_mamba2, *here, form="dual", turned=False),
        "mamba-1 round": partial(_mamba1, *here), "window round": partial(_window, *here), "convolution round": partial(_ring, *here),
        "attention to slots": partial(_slots, *here),
    }  # fmt: skip
    made |= {name: partial(_both, partial(_called, run)) for name, run in rounds.items()}
    return made if device == "cpu" else made | {"graph": partial(_captured, device)}


def _called(run: Callable[..., Made], impl: str) -> Made:
    return run(impl=impl)
