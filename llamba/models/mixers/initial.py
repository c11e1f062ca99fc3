"""Where a mixer's values come from: the teacher's attention, or one of the declared initialisations of what is new.

Shapes: D model width, H query heads, G key/value heads, P head width, N state width, W convolution width.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import initialization

from llamba.models.mixers.base import Mixer
from llamba.models.mixers.config import AttentionWeights
from llamba.models.mixers.parts import at_least_fp32

OPEN_GATE = 1.2784645427610738  # SiLU(OPEN_GATE) = 1
NO_DECAY = -40.0
AT_ONCE = 6.0  # bias of the share of a write that comes at once
ERASED = 0.3  # of what stands under a key when it is written to, at the start
MEMORY_TOKENS = (16.0, 2048.0)
MEMORY_BESIDE = (512.0, 8192.0)  # of a recurrence beside a window, which sees what is near
REST_SCORE = -6.0  # mean score of a token out of sight, at the start


@dataclass(frozen=True)
class Init:
    """How a mixer starts. `decay` names a rule for A_log and the step bias; see `_decay`."""

    copy_attention: bool = True
    open_gate: bool = True
    identity_conv: bool = True
    decay: str = "log_spaced"
    skip: float = 0.0


INITS = {
    # As close to linear attention as a mixer that can forget allows.
    "attention": Init(),
    # Mamba-in-Llama: random gate, convolution and step, Mamba's own decay, D = 1.
    "paper": Init(open_gate=False, identity_conv=False, decay="paper", skip=1.0),
    # MOHAWK: open gate and identity convolution, nothing from attention, D = 1.
    "mohawk": Init(copy_attention=False, decay="paper", skip=1.0),
    # The papers' ablation: nothing from attention.
    "random": Init(copy_attention=False, open_gate=False, identity_conv=False, decay="paper", skip=1.0),
    # Exactly linear attention where the mixer has no output norm, no activation after the convolution and N = P.
    "linear_attention": Init(decay="none"),
}


class Origin(NamedTuple):
    """One line of a conversion record: a mixer tensor (or named rows of it), its shape, and where its values came from."""

    tensor: str
    shape: tuple[int, ...]
    source: str


def initialise(mixer: Mixer, weights: AttentionWeights | None, init: str, generator: torch.Generator | None = None) -> list[Origin]:
    """Set every parameter of the mixer and say where each came from.

    `weights` None (a model built without a teacher) or an `init` that does not copy leaves random projections.
    Raises ValueError for an unknown `init`, or a teacher's bias that the mixer's configuration has no place for.
    """
    if init not in INITS:
        raise ValueError(f"student.init must be one of {', '.join(INITS)}; got {init!r}")
    if not mixer.rows():
        return []
    rule = INITS[init]
    taken = weights if rule.copy_attention else None
    origins = _projections(mixer, taken, rule, generator)
    origins += _convolution(mixer, rule, generator) + _decay(mixer, rule.decay, generator)
    origins += _skip(mixer, rule.skip) + _erasing(mixer, rule.decay) + _turning(mixer, weights, rule)
    return origins + _join(mixer) + _qk_norms(mixer, taken)


def _join(mixer: Mixer) -> list[Origin]:
    """What the recurrence's channels count behind the gate: 1, and beside a window 0, where the mean of what is out of sight starts."""
    name, weight = mixer.gain
    values = {} if weight is None else {name: 0.0 if mixer.sight else 1.0}
    if mixer.sight:
        values |= {"rest_bias": REST_SCORE, "rest_growth": 1.0, "rest_mean": 1.0}
    for name, value in values.items():
        parameter = mixer.get_parameter(name)
        _set(parameter, torch.full_like(parameter, value))
    return [Origin(name, tuple(mixer.get_parameter(name).shape), f"new: {value:g}") for name, value in values.items()]


def _skip(mixer: Mixer, value: float) -> list[Origin]:
    if not mixer.has_skip:
        return []
    _set(mixer.D, torch.full_like(mixer.D, value))
    return [Origin("D", tuple(mixer.D.shape), f"new: {value:g}")]


def _erasing(mixer: Mixer, decay: str) -> list[Origin]:
    """The bias of the gate that erases: half open where decays are Mamba's own, shut where there is none, else open a little."""
    if not mixer.erases:
        return []
    share = {"paper": 0.5, "log_spaced": ERASED}.get(decay)
    bias = NO_DECAY if share is None else math.log(share / (1 - share))
    _set(mixer.erase_bias, torch.full_like(mixer.erase_bias, bias))
    return [Origin("erase_bias", tuple(mixer.erase_bias.shape), "new: shut" if share is None else f"new: {share:g} erased")]


def _turning(mixer: Mixer, weights: AttentionWeights | None, rule: Init) -> list[Origin]:
    """Mamba-3's own: the teacher's angles where it forgets, writes that come at once, biases of keys and queries that do nothing yet."""
    if not mixer.turns:
        return []
    known = None if weights is None or rule.decay == "none" else weights.frequencies
    now = {"paper": 0.0, "log_spaced": AT_ONCE}.get(rule.decay, -NO_DECAY)
    values = {
        "theta_log": torch.full_like(mixer.theta_log, NO_DECAY) if known is None else known.log(),
        "trap_bias": torch.full_like(mixer.trap_bias, now),
        "B_bias": torch.zeros_like(mixer.B_bias), "C_bias": torch.zeros_like(mixer.C_bias),
    }  # fmt: skip
    for name, value in values.items():
        _set(mixer.get_parameter(name), value)
    sources = {"theta_log": "new: no angle" if known is None else "RoPE's frequencies", "trap_bias": f"new: {now:g}"}
    return [Origin(name, tuple(value.shape), sources.get(name, "new: 0")) for name, value in values.items()]


def _set(parameter: Tensor, value: Tensor) -> None:
    initialization.copy_(parameter, value.to(parameter.dtype))


def _uniform(like: Tensor, bound: float, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def _projections(mixer: Mixer, weights: AttentionWeights | None, rule: Init, generator: torch.Generator | None) -> list[Origin]:
    weight, bias, out = mixer.in_proj.weight, mixer.in_proj.bias, mixer.out_proj
    new_weight = _uniform(weight, weight.shape[1] ** -0.5, generator)
    new_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
    # fp64 teachers keep their digits
    new_weight = new_weight if weights is None else new_weight.to(torch.promote_types(weights.q.dtype, torch.float32))
    new_bias = None if new_bias is None else new_bias.to(new_weight.dtype)
    origins, row = [], 0
    for name, count in mixer.layout().items():
        rows = slice(row, row + count)
        row += count
        source = _fill_rows(name, rows, new_weight, new_bias, weights, rule)
        origins.append(Origin(f"in_proj.weight[{name}]", (count, weight.shape[1]), source))
        if bias is not None:
            origins.append(Origin(f"in_proj.bias[{name}]", (count,), _bias_source(name, weights, rule)))
    _set(weight, new_weight)
    if bias is not None and new_bias is not None:
        _set(bias, new_bias)
    _set(out.weight, _uniform(out.weight, out.weight.shape[1] ** -0.5, generator) if weights is None else weights.o)
    origins.append(Origin("out_proj.weight", tuple(out.weight.shape), "new: random" if weights is None else "o_proj.weight"))
    if out.bias is not None:
        taken = None if weights is None else weights.o_bias
        _set(out.bias, torch.zeros_like(out.bias) if taken is None else taken)
        origins.append(Origin("out_proj.bias", tuple(out.bias.shape), "new: 0" if taken is None else "o_proj.bias"))
    return origins


TAKEN = {"x": "v", "B": "k", "C": "q"}


def _fill_rows(name: str, rows: slice, weight: Tensor, bias: Tensor | None, weights: AttentionWeights | None, rule: Init) -> str:
    """Fill the named rows in place and return their source; rows that nothing claims stay as drawn."""
    if name in TAKEN and weights is not None:
        short = TAKEN[name]
        taken = getattr(weights, short)
        if len(taken) != len(weight[rows]):
            raise ValueError(f"K and Q become B and C where state = head_dim; got {len(weight[rows])} rows for {len(taken)}")
        weight[rows] = taken
        short_bias = getattr(weights, f"{short}_bias")
        if short_bias is not None:
            if bias is None:
                raise ValueError(f"the teacher's {short}_proj has a bias; the mixer needs proj_bias=true to carry it, got false")
            bias[rows] = short_bias
        return f"{short}_proj.weight"
    if name == "rest" or (name == "z" and rule.open_gate) or (name in ("dt", "erase", "rate", "trap", "angle") and rule.decay != "paper"):
        weight[rows] = 0
        if name == "z" and bias is not None:
            bias[rows] = OPEN_GATE
        return "new: 0"
    return "new: random"


def _bias_source(name: str, weights: AttentionWeights | None, rule: Init) -> str:
    if name in TAKEN and weights is not None and getattr(weights, f"{TAKEN[name]}_bias") is not None:
        return f"{TAKEN[name]}_proj.bias"
    return f"new: {OPEN_GATE:.4f} (open gate)" if name == "z" and rule.open_gate else "new: 0"


def _convolution(mixer: Mixer, rule: Init, generator: torch.Generator | None) -> list[Origin]:
    conv = mixer.conv1d
    assert conv.bias is not None
    weight, bias = torch.zeros_like(conv.weight), torch.zeros_like(conv.bias)
    if rule.identity_conv:
        weight[..., -1] = 1
    else:
        bound = mixer.config.conv_width**-0.5
        weight, bias = _uniform(conv.weight, bound, generator), _uniform(conv.bias, bound, generator)
    _set(conv.weight, weight)
    _set(conv.bias, bias)
    source = "new: identity" if rule.identity_conv else "new: random"
    return [Origin("conv1d.weight", tuple(conv.weight.shape), source), Origin("conv1d.bias", tuple(conv.bias.shape), source)]


def _inverse_softplus(step: Tensor) -> Tensor:
    return step + torch.log(-torch.expm1(-step))


def _decay(mixer: Mixer, decay: str, generator: torch.Generator | None) -> list[Origin]:
    """A_log and the step bias.

    "log_spaced": A = 1 and steps 1/tau, memories tau log-spaced over the heads so that every key/value group has short and long ones.
    "paper": Mamba's steps, log-uniform in [0.001, 0.1], with A uniform in [1, 16] (Mamba-2) or 1..N (Mamba-1); discrete Mamba-2: bias 0.
    "none": no decay and step 1, linear attention.
    """
    if "dt_bias" not in dict(mixer.named_parameters()):
        return []
    bias, discrete = mixer.dt_bias, "A_log" not in dict(mixer.named_parameters())
    a_log = None if discrete else torch.zeros_like(mixer.A_log)
    if decay == "log_spaced":
        step = 1 / _memories(mixer)
        value = _inverse_softplus(step).repeat_interleave(bias.numel() // step.numel())
    elif decay == "paper":
        low, high = math.log(1e-3), math.log(1e-1)
        drawn = torch.empty_like(bias, dtype=torch.float32).uniform_(low, high, generator=generator).exp()
        value = torch.zeros_like(bias) if discrete else _inverse_softplus(drawn)
        if a_log is not None and a_log.ndim == 1:
            a_log = torch.empty_like(a_log, dtype=torch.float32).uniform_(1, 16, generator=generator).log()
        elif a_log is not None:
            a_log = torch.arange(1, a_log.shape[1] + 1, dtype=torch.float32, device=a_log.device).log().expand_as(a_log)
    else:
        one = torch.ones((), dtype=torch.float64, device=bias.device)
        value = torch.full_like(bias, NO_DECAY) if discrete else _inverse_softplus(one).expand_as(bias)
        a_log = None if a_log is None else torch.full_like(a_log, NO_DECAY)
    _set(bias, value)
    origins = [Origin("dt_bias", tuple(bias.shape), f"new: {decay}")]
    if a_log is not None:
        _set(mixer.A_log, a_log)
        origins.append(Origin("A_log", tuple(a_log.shape), f"new: {decay}"))
    return origins + _step_projection(mixer, generator)


def _step_projection(mixer: Mixer, generator: torch.Generator | None) -> list[Origin]:
    if not mixer.projects_steps:
        return []
    weight = mixer.dt_proj.weight
    _set(weight, _uniform(weight, weight.shape[1] ** -0.5, generator))
    return [Origin("dt_proj.weight", tuple(weight.shape), "new: random")]


def _memories(mixer: Mixer) -> Tensor:
    """Memory in tokens of each head [H]: log-spaced, neighbours in a key/value group far apart."""
    c = mixer.config
    low, high = (math.log(tokens) for tokens in (MEMORY_BESIDE if mixer.sight else MEMORY_TOKENS))
    order = torch.arange(c.heads).view(c.heads // c.groups, c.groups).T.reshape(-1)  # head (g, r) has rank r G + g
    return torch.linspace(low, high, c.heads, dtype=torch.float64)[order].exp().to(mixer.dt_bias.device)


def _qk_norms(mixer: Mixer, weights: AttentionWeights | None) -> list[Origin]:
    if mixer.config.qk_norm is None:
        return []
    origins = []
    for name, parameter in mixer.named_parameters():
        if name.startswith(("q_norm", "k_norm")):
            fresh = torch.zeros_like(parameter) if name.endswith("bias") else torch.ones_like(parameter)
            _set(parameter, fresh if weights is None else at_least_fp32(weights.norms[name]))
            origins.append(Origin(name, tuple(parameter.shape), "new: identity" if weights is None else name))
    return origins
