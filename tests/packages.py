"""Other packages' kernels where there is no GPU: stand-ins with their signatures, and the real ones in Triton's interpreter.

Run as a script, with the packages on the path, it prints the worst relative RMS error of each case and tensor against the sequential
forms in fp64, as JSON. Shapes: B batch, T time, H heads, G groups, P head width, N state width, C channels, W conv width, S sequences.
"""

import builtins
import contextlib
import importlib
import importlib.machinery
import json
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from triton_tools import rms, with_gradients

from llamba.kernels.conv1d import causal_conv1d
from llamba.kernels.delta import delta_rule
from llamba.kernels.selective_scan import selective_scan
from llamba.kernels.ssd import ssd

B, T, P, N = 2, 20, 16, 32


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None, dt_softplus=False,
    dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """mamba-ssm 2.3's, one token at a time; its own assertions first."""
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    assert B.shape == C.shape == (batch, seqlen, ngroups, dstate) and nheads % ngroups == 0
    assert dt.shape == (batch, seqlen, nheads) and A.shape == (nheads,) and (A <= 0).all()
    assert x.dtype == B.dtype == C.dtype and chunk_size == 1 << (chunk_size.bit_length() - 1)
    assert seq_idx is None or (seq_idx.shape == (batch, seqlen) and seq_idx.dtype == torch.int32)
    assert initial_states is None or initial_states.shape == (batch, nheads, headdim, dstate)
    assert z is None and dt_bias is None and cu_seqlens is None and not dt_softplus and return_final_states and not return_varlen_states
    state = x.new_zeros(batch, nheads, headdim, dstate) if initial_states is None else initial_states
    B, C = (t.repeat_interleave(nheads // ngroups, 2) for t in (B, C))
    ys, document = [], torch.zeros(batch, dtype=torch.int32)
    for t in range(seqlen):
        if seq_idx is not None:
            state, document = state * (seq_idx[:, t] == document)[:, None, None, None], seq_idx[:, t]
        step = dt[:, t, :, None, None]
        state = state * (step * A[:, None, None]).exp() + step * x[:, t, :, :, None] * B[:, t, :, None]
        ys.append((state * C[:, t, :, None]).sum(-1))
    out = torch.stack(ys, 1)
    return (out if D is None else out + D[:, None] * x).to(x.dtype), state


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None, **kwargs,
):  # fmt: skip
    """flash-linear-attention 0.6's, one token at a time."""
    assert q.dtype == k.dtype == v.dtype and q.shape == k.shape and g.shape == q.shape[:3] == v.shape[:3] and g_gamma is None
    assert scale == 1.0 and output_final_state and not state_v_first and set(kwargs) <= {"chunk_size"}
    bounds = [(row, 0, q.shape[1]) for row in range(len(q))]
    if cu_seqlens is not None:
        assert len(q) == 1 and cu_seqlens[0] == 0 and cu_seqlens[-1] == q.shape[1] and (cu_seqlens.diff() > 0).all()
        bounds = [(0, start, stop) for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    assert initial_state is None or initial_state.shape == (len(bounds), H, K, V)
    outs, lasts = [], []
    for number, (row, start, stop) in enumerate(bounds):
        state = q.new_zeros(H, K, V) if initial_state is None else initial_state[number]
        for t in range(start, stop):
            state = state * g[row, t, :, None, None].exp() + k[row, t, :, :, None] * v[row, t, :, None]
            outs.append((state * q[row, t, :, :, None]).sum(1))
        lasts.append(state)
    return torch.stack(outs).view(v.shape).to(q.dtype), torch.stack(lasts)


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    """flash-linear-attention 0.6's, one token at a time; a gate g for every head, or (`chunk_kda`) for every key channel."""
    assert q.dtype == k.dtype == v.dtype and q.shape == k.shape and beta.shape == q.shape[:3] == v.shape[:3] == g.shape[:3]
    assert scale == 1.0 and output_final_state and not kwargs
    assert not (use_qk_l2norm_in_kernel or use_beta_sigmoid_in_kernel or allow_neg_eigval or state_v_first)
    bounds = [(row, 0, q.shape[1]) for row in range(len(q))]
    if cu_seqlens is not None:
        assert len(q) == 1 and cu_seqlens[0] == 0 and cu_seqlens[-1] == q.shape[1] and (cu_seqlens.diff() > 0).all()
        bounds = [(0, start, stop) for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    assert initial_state is None or initial_state.shape == (len(bounds), H, K, V)
    decay, outs, lasts = g.exp().view(*g.shape[:3], -1, 1), [], []
    for number, (row, start, stop) in enumerate(bounds):
        state = q.new_zeros(H, K, V) if initial_state is None else initial_state[number]
        for t in range(start, stop):
            state = state * decay[row, t]
            wrong = v[row, t] - (state * k[row, t, :, :, None]).sum(1)
            state = state + k[row, t, :, :, None] * (beta[row, t, :, None] * wrong)[:, None]
            outs.append((state * q[row, t, :, :, None]).sum(1))
        lasts.append(state)
    return torch.stack(outs).view(v.shape).to(q.dtype), torch.stack(lasts)


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """mamba-ssm 2.3's, one token at a time; what its extension checks first."""
    batch, dim, seqlen = u.shape
    groups, dstate = B.shape[1:3]
    assert delta.shape == u.shape and A.shape == (dim, dstate) and B.shape == C.shape == (batch, groups, dstate, seqlen)
    assert delta.dtype == B.dtype == C.dtype == u.dtype and A.dtype == torch.float32 and (D is None or D.dtype == torch.float32)
    assert z is None and delta_bias is None and not delta_softplus and return_last_state and dstate <= 256 and dim % groups == 0
    B, C = (t.repeat_interleave(dim // groups, 1) for t in (B, C))
    state, ys = u.new_zeros(batch, dim, dstate), []
    for t in range(seqlen):
        step = delta[:, :, t, None]
        state = state * (step * A).exp() + step * B[..., t] * u[:, :, t, None]
        ys.append((state * C[..., t]).sum(-1))
    out = torch.stack(ys, -1)
    return (out if D is None else out + D[:, None] * u).to(u.dtype), state.detach().requires_grad_(state.requires_grad)


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None
):
    """causal-conv1d 1.7's, one token at a time; what its extension checks first."""
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    assert x.stride(1) == 1 and dim % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0 and 2 <= width <= 4 and weight.shape[0] == dim
    assert bias is None or (bias.dtype == weight.dtype and bias.stride(-1) == 1)
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous() and seq_idx.shape == (batch, seqlen))
    assert initial_states is None or (initial_states.shape == (batch, dim, width - 1) and initial_states.stride(1) == 1 and seq_idx is None)
    assert initial_states is None or initial_states.dtype == x.dtype
    assert activation in (None, "silu", "swish") and not return_final_states and final_states_out is None
    before = x.new_zeros(batch, dim, width - 1) if initial_states is None else initial_states
    windows = torch.cat([before, x], -1).unfold(-1, width, 1)  # [batch, dim, seqlen, width]
    if seq_idx is not None:
        documents = torch.nn.functional.pad(seq_idx, (width - 1, 0), value=-1).unfold(-1, width, 1)
        windows = windows * (documents == seq_idx[..., None])[:, None]
    out = (windows * weight[:, None]).sum(-1) + (0 if bias is None else bias[:, None])
    return (out if activation is None else silu(out)).to(x.dtype)


STAND_INS = {
    "mamba_ssm": {}, "mamba_ssm.ops": {}, "mamba_ssm.ops.triton": {}, "fla": {}, "fla.ops": {},
    "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": chunk_gated_delta_rule}, "fla.ops.kda": {"chunk_kda": chunk_gated_delta_rule},
    "fla.ops.simple_gla": {"chunk_simple_gla": chunk_simple_gla}, "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn},
}  # fmt: skip


def stand_in(name: str, **members: Any) -> types.ModuleType:
    """A module with a spec, so that it can be found as an installed one."""
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(members)
    return made


def _documents() -> Tensor:
    """[B, T]: a row of several documents, and one whose first is not number 0."""
    return torch.stack([torch.arange(T) * 3 // T, 1 + torch.arange(T) * 5 // (2 * T)])


def _holes() -> Tensor:
    return torch.stack([torch.arange(T) % 3 != 1, torch.arange(T) % 5 < 2])


def _randn(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=made) for name, shape in shapes.items()}


def _ssd(rates: bool, H: int = 4, G: int = 2, without: str = "") -> dict[str, Tensor]:
    inputs = _randn(
        x=(B, T, G, P), a=(H,) if rates else (B, T, H), b=(B, T, G, N), c=(B, T, H, N), dt=(B, T, H), D=(H,), state=(B, H, P, N)
    )
    inputs |= {"a": -inputs["a"].abs(), "dt": inputs["dt"].abs()}
    return {name: tensor for name, tensor in inputs.items() if name not in without.split()}


def _delta(channels: bool, without: str = "") -> dict[str, Tensor]:
    inputs = _randn(
        x=(B, T, 2, P), a=(B, T, 4, *([N] if channels else [])), b=(B, T, 2, N), c=(B, T, 4, N), erase=(B, T, 4), write=(B, T, 4),
        state=(B, 4, P, N),
    )  # fmt: skip
    unit = torch.nn.functional.normalize(inputs["b"], dim=-1)
    inputs |= {"a": -inputs["a"].abs() * 0.1, "b": unit, "erase": inputs["erase"].sigmoid() / 2 + 0.5, "write": inputs["write"].sigmoid()}
    return {name: tensor for name, tensor in inputs.items() if name not in without.split()}


def cases() -> Iterator[tuple[str, Any, str, dict[str, Tensor], dict[str, Any]]]:
    """Name, operation, form, inputs and options of everything that a package is asked to do."""
    docs, holes = {"seq_idx": _documents()}, {"mask": _holes()}
    for form, rates in (("mamba_ssm", True), ("fla", True), ("fla", False)):
        kind = f"ssd {form} {'rates' if rates else 'decays'}"
        small = {"chunk": 16}
        yield kind, ssd, form, _ssd(rates), small
        yield f"{kind}, documents and padding", ssd, form, _ssd(rates), small | docs | holes
        yield f"{kind}, H = G, bare", ssd, form, _ssd(rates, 2, 2, "D state"), small
        yield f"{kind}, documents without a state", ssd, form, _ssd(rates, without="state"), small | docs
    yield "ssd fla discrete", ssd, "fla", _ssd(False, without="dt"), {"chunk": 16} | holes
    for kind, channels in (("heads", False), ("channels", True)):
        yield f"delta rule by {kind}, documents and padding", delta_rule, "fla", _delta(channels), docs | holes
        yield f"delta rule by {kind}, bare", delta_rule, "fla", _delta(channels, "state write"), {}
    inputs = _randn(x=(B, T, 12), dt=(B, T, 12), A=(12, 3), b=(B, T, 2, 3), c=(B, T, 2, 3), D=(12,))
    inputs |= {"dt": inputs["dt"].abs(), "A": -inputs["A"].abs()}
    yield "selective_scan", selective_scan, "mamba_ssm", inputs, {}
    yield "selective_scan, padding", selective_scan, "mamba_ssm", {name: t for name, t in inputs.items() if name != "D"}, holes
    inputs = _randn(x=(B, T, 16), weight=(16, 4), bias=(16,), state=(B, 3, 16))
    free = {name: inputs[name] for name in ("x", "weight", "bias")}
    yield "conv1d", causal_conv1d, "causal_conv1d", inputs, {"activation": "silu"} | holes
    yield "conv1d, documents and padding", causal_conv1d, "causal_conv1d", free, docs | holes
    yield "conv1d, short", causal_conv1d, "causal_conv1d", {**inputs, "x": inputs["x"][:, :2]}, {"activation": "silu"}


def errors(op: Any, form: str, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, float]:
    """Relative RMS error of every output and gradient of a case, in fp32."""
    call = _without_last(op) if op is selective_scan else op
    got = with_gradients(call, inputs, impl=form, **options)
    want = with_gradients(call, {name: t.double() for name, t in inputs.items()}, impl="sequential", **options)
    return {name: rms(got[name].double() - exact) / rms(exact) for name, exact in want.items()}


def _without_last(op: Any) -> Any:
    """The operation with a last state that asks for no gradient."""

    def call(**inputs: Any) -> tuple[Tensor, Tensor]:
        y, last = op(**inputs)
        return y, last.detach()

    return call


def _range(*bounds: Any) -> Iterator[Any]:
    """Loop counters as tensors, as they are when compiled."""
    from triton.language import tensor
    from triton.runtime.interpreter import _implicit_cvt

    return map(_implicit_cvt, builtins.range(*(int(v.handle.data.item()) if isinstance(v, tensor) else v for v in bounds)))


def _interpret() -> None:
    """Let the packages import and their kernels run on the CPU: empty extensions, the first configuration, a device that is not there."""
    for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
        sys.modules[name] = types.ModuleType(name)
    from triton.runtime.autotuner import Autotuner

    whole = Autotuner.__init__
    Autotuner.__init__ = lambda self, fn, names, configs, *a, **k: whole(self, fn, names, configs[:1], *a, **k)
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=1, name="", total_memory=0)
    for name in ("chunk_h", "chunk_o"):
        importlib.import_module(f"fla.ops.common.{name}").range = _range
    scan, convolution = (importlib.import_module(name) for name in ("mamba_ssm.ops.selective_scan_interface", "causal_conv1d"))
    scan.selective_scan_fn = scan.selective_scan_ref  # these two are compiled for CUDA alone; their references come with them
    convolution.causal_conv1d_fn = importlib.import_module("causal_conv1d.causal_conv1d_interface").causal_conv1d_ref


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _interpret()
    for name, op, form, inputs, options in cases():
        print(json.dumps({"case": name, "errors": errors(op, form, inputs, options)}), flush=True)
