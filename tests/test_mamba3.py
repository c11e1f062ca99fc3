"""Mamba-3: its recurrence against the paper's equations, its exact limits, and mamba-ssm's own parametrisation.

Shapes: B batch, T time, H query heads, G value heads, P head width, N state width, S angles.
"""

import math
from typing import Any

import pytest
import torch
from models import TEACHERS, ids, rms_error, student, teacher
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from transformers import DynamicCache

from llamba.kernels.mamba3 import mamba3_matrix, mamba3_scan, mamba3_step
from llamba.kernels.window import turned
from llamba.models.convert import convert
from llamba.models.mixers import build_mixer
from llamba.models.mixers.mamba3 import Mamba3, official

B, T, H, G, P, N, S = 2, 29, 4, 2, 5, 8, 3
OVER_TIME = ("x", "a", "b", "c", "turn", "dt", "now")
Named = dict[str, Tensor]


def inputs(**sizes: int) -> Named:
    made, t = torch.Generator().manual_seed(0), sizes.get("T", T)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    return {
        "x": randn(B, t, G, P), "a": -randn(B, t, H).abs(), "b": randn(B, t, H, N), "c": randn(B, t, H, N), "turn": 9 * randn(B, t, H, S),
        "dt": randn(B, t, H).abs(), "now": randn(B, t, H).sigmoid(), "D": randn(H), "state": randn(B, H, P + 1, N + 1),
    }  # fmt: skip


def turn_pairs(values: Tensor, angles: Tensor) -> Tensor:
    """values [..., N] with the pairs (i, i + S) turned, as products of complex numbers."""
    width = angles.shape[-1]
    pairs = torch.complex(values[..., :width], values[..., width : 2 * width]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag, values[..., 2 * width :]), -1)


def by_the_paper(i: Named, row: int, places: list[int], fresh: bool) -> Tensor:
    """y [T', H, P] of one row's tokens at `places`, in a frame that stands still (arXiv 2603.15569, equations of section 3)."""
    state = torch.zeros_like(i["state"][row]) if fresh else i["state"][row]
    h, before, key, phase = state[:, :P, :N], state[:, :P, N], state[:, P, :N], torch.zeros(H, S, dtype=torch.float64)
    ys = []
    for t in places:
        x, dt, now, alpha = i["x"][row, t].repeat_interleave(H // G, 0), i["dt"][row, t], i["now"][row, t], i["a"][row, t].exp()
        phase = phase + i["turn"][row, t]
        k, q = turn_pairs(i["b"][row, t], phase), turn_pairs(i["c"][row, t], phase)
        old = ((1 - now) * dt * alpha)[:, None, None] * before[..., None] * key[:, None]
        h = alpha[:, None, None] * h + old + (now * dt)[:, None, None] * x[..., None] * k[:, None]
        ys.append((h * q[:, None]).sum(-1) + i["D"][:, None] * x)
        before, key = x, k
    return torch.stack(ys)


@pytest.mark.parametrize("impl", ["torch", "sequential"])
def test_both_forms_are_the_papers_recurrence_with_documents_and_padding(impl: str) -> None:
    i = inputs()
    docs = torch.stack((torch.arange(T) * 3 // T, torch.zeros(T, dtype=torch.long)))
    mask = torch.stack((torch.arange(T) % 4 != 2, torch.arange(T) > 3))
    y, _ = mamba3_scan(**i, seq_idx=docs, mask=mask, impl=impl, **({"chunk": 8} if impl == "torch" else {}))
    assert not y[~mask].any()
    for row in range(B):
        for document in docs[row].unique().tolist():
            places = [t for t in range(T) if docs[row, t] == document and mask[row, t]]
            assert rms_error(y[row, places], by_the_paper(i, row, places, document > 0)) < 1e-12


def every(i: Named, **options: Any) -> list[Tensor]:
    """Output, state and all gradients."""
    leaves = {name: value.clone().requires_grad_() for name, value in i.items()}
    y, last = mamba3_scan(**leaves, **options)
    loss = y.square().sum() + (last * torch.linspace(0, 1, last.numel(), dtype=last.dtype).view_as(last)).sum()
    return [y.detach(), last.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize("case", ["plain", "documents", "mask"])
def test_gradients_equal_those_of_the_sequential_form(case: str) -> None:
    chosen: dict[str, Any] = {
        "documents": {"seq_idx": torch.arange(T).expand(B, T) // 10}, "mask": {"mask": torch.arange(B * T).view(B, T) % 3 > 0}
    }.get(case, {})  # fmt: skip
    for got, want in zip(every(inputs(), chunk=8, **chosen), every(inputs(), impl="sequential", **chosen), strict=True):
        assert rms_error(got, want) < 1e-11


def test_pieces_and_steps_continue_the_whole() -> None:
    i = inputs()
    whole, last = mamba3_scan(**i)
    state, ys = i["state"], []
    for span in (slice(0, 11), slice(11, 12), slice(12, T)):
        y, state = mamba3_scan(**{name: value[:, span] for name, value in i.items() if name in OVER_TIME}, D=i["D"], state=state)
        ys.append(y)
    assert rms_error(torch.cat(ys, 1), whole) < 1e-12 and rms_error(state, last) < 1e-12
    state, ys = i["state"], []
    for t in range(T):
        y, state = mamba3_step(*(i[name][:, t] for name in OVER_TIME), state=state, D=i["D"])
        ys.append(y)
    assert rms_error(torch.stack(ys, 1), whole) < 1e-12 and rms_error(state, last) < 1e-12


def test_the_matrix_times_x_is_the_output() -> None:
    i = inputs()
    parts = {name: i[name] for name in ("a", "b", "c", "turn", "dt", "now")}
    want, _ = mamba3_scan(i["x"], **parts, impl="sequential")
    M = mamba3_matrix(**parts)
    assert rms_error(torch.einsum("bhij,bjhp->bihp", M, i["x"].repeat_interleave(H // G, 2)), want) < 1e-12
    assert rms_error(mamba3_matrix(**parts, rows=slice(3, 9)), M[:, :, 3:9]) < 1e-14


@pytest.mark.parametrize("name", TEACHERS)
def test_without_decay_it_is_the_teachers_rotary_linear_attention(name: str) -> None:
    """tril(R(Q) R(K)^T) V O^T with the family's own cosines and sines, GQA and partial rotation included."""
    source = teacher(name)
    made = convert(source, mixer="mamba3", attention=0.0, init="linear_attention", options={"out_norm": False})
    u, positions = torch.randn(2, 40, 32, dtype=torch.float64), torch.arange(40)[None]
    angles: Any = source.model.rotary_emb.inv_freq.double() * positions[..., None]
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    reference = convert(source, mixer="mamba2", attention=0.0, init="linear_attention", options={"conv_activation": None, "rotary": True})
    for before, layer in zip(reference.model.layers, made.model.layers, strict=True):
        mixer, shape = layer.self_attn, before.self_attn.config
        mixer.theta_log.data = source.model.rotary_emb.inv_freq.double().log()
        parts = before.self_attn._project(u)
        v, k, q = before.self_attn.heads_of(parts["conv"], parts)
        q, k = turned(q, cos, sin), turned(k, cos, sin).repeat_interleave(shape.heads // shape.groups, 2)
        scores = torch.einsum("bthn,bshn->bhts", q, k).tril()
        want = torch.einsum("bhts,bshp->bthp", scores, v.repeat_interleave(shape.heads // shape.groups, 2)).flatten(2)
        assert rms_error(mixer(u)[0], mixer.out_proj(want)) < 1e-9


def test_it_starts_with_the_teachers_angles_and_is_mamba2_without_them() -> None:
    source = teacher("phi")
    made = convert(source, mixer="mamba3", attention=0.0)
    first = made.model.layers[0].self_attn
    assert rms_error(first.theta_log.exp(), source.model.rotary_emb.inv_freq.double()) < 1e-6 and first.config.angles == 2
    assert not first.in_proj.weight[-first.config.angles :].any()
    other = convert(source, mixer="mamba2", attention=0.0, options={"conv_activation": None}).model.layers[0].self_attn
    u = torch.randn(2, 30, 32, dtype=torch.float64)
    with torch.no_grad():
        for one in (first, other):
            nn.init.normal_(one.dt_bias, generator=torch.Generator().manual_seed(1))
            nn.init.normal_(one.A_log, generator=torch.Generator().manual_seed(2))
            nn.init.normal_(one.D, generator=torch.Generator().manual_seed(3))
            rows = one.in_proj.weight[sum(one.rows()[name] for name in "zxBC") :][:4]
            nn.init.normal_(rows, generator=torch.Generator().manual_seed(4))
        assert rms_error(first(u)[0], other(u)[0]) > 1e-2
        first.theta_log.fill_(-40)
        first.trap_bias.fill_(40)
        assert rms_error(first(u)[0], other(u)[0]) < 1e-12


@torch.no_grad()
def test_whole_chunked_stepwise_padded_packed_and_taken_back_agree() -> None:
    model, tokens = student("mamba3", "phi-qk-norm", attention=0.0), ids(2, 45)
    whole = model(tokens, use_cache=False).logits
    first = model(tokens[:, :33])
    rest = [model(tokens[:, t : t + 1], past_key_values=first.past_key_values).logits for t in range(33, 45)]
    assert rms_error(torch.cat((first.logits, *rest), 1), whole) < 1e-10
    mask = (torch.arange(50) >= 5).long().expand(2, 50)
    padded = torch.cat((torch.zeros(2, 5, dtype=torch.long), tokens), 1)
    assert rms_error(model(padded, attention_mask=mask, use_cache=False).logits[:, 5:], whole) < 1e-10
    positions = torch.cat((torch.arange(20), torch.arange(25)))[None].expand(2, -1)
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    assert rms_error(packed[:, 20:], model(tokens[:, 20:], use_cache=False).logits) < 1e-10
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(tokens[:, :20], past_key_values=cache)
    model(ids(2, 7, seed=1), past_key_values=cache)
    cache.crop(-7)
    assert rms_error(model(tokens[:, 20:], past_key_values=cache).logits, whole[:, 20:]) < 1e-10


def _published(u: Tensor, w: Named, heads: int, groups: int, width: int, angles: int) -> Tensor:
    """mamba-ssm 2.3.2.post1's layer (modules/mamba3.py; SISO, no output norm), from its own weights, one token after the other."""
    state = w["B_norm.weight"].shape[0]
    sizes = [heads * width, heads * width, groups * state, groups * state, heads, heads, heads, angles]
    z, x, b, c, dt, rate, trap, angle = (u @ w["in_proj.weight"].T).split(sizes, -1)
    dt, now = softplus(dt + w["dt_bias"]), torch.sigmoid(trap)
    decay = (-softplus(rate).clamp_min(1e-4) * dt).exp()
    x = x.unflatten(-1, (heads, width))

    def read(values: Tensor, kind: str) -> Tensor:  # [B, T, H, N]
        values = values.unflatten(-1, (groups, state))
        normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-5) * w[f"{kind}_norm.weight"]
        return normed.repeat_interleave(heads // groups, 2) + w[f"{kind}_bias"][:, 0]

    phase = (dt[..., None] * math.pi * torch.tanh(angle)[..., None, :]).cumsum(1)  # [B, T, H, S]

    def turn(values: Tensor) -> Tensor:  # neighbours together
        pairs = torch.view_as_complex(values[..., : 2 * angles].unflatten(-1, (angles, 2)).contiguous())
        return torch.cat(
            (torch.view_as_real(pairs * torch.polar(torch.ones_like(phase), phase)).flatten(-2), values[..., 2 * angles :]), -1
        )

    keys, queries = turn(read(b, "B")), turn(read(c, "C"))
    h, ys = torch.zeros(len(u), heads, width, state, dtype=u.dtype), []
    for t in range(u.shape[1]):
        h = h * decay[:, t, :, None, None]
        if t:
            share = (1 - now[:, t]) * dt[:, t] * decay[:, t]
            h = h + share[..., None, None] * x[:, t - 1, :, :, None] * keys[:, t - 1, :, None]
        h = h + (now[:, t] * dt[:, t])[..., None, None] * x[:, t, :, :, None] * keys[:, t, :, None]
        ys.append((h * queries[:, t, :, None]).sum(-1) + w["D"][:, None] * x[:, t])
    return (torch.stack(ys, 1).flatten(2) * silu(z)) @ w["out_proj.weight"].T


@pytest.mark.parametrize("groups", [1, 2])
def test_official_weights_load_and_compute_what_the_official_layer_does(groups: int) -> None:
    heads, width, state, angles, D = 4, 6, 8, 2, 16
    made = torch.Generator().manual_seed(0)
    rows = 2 * heads * width + 2 * groups * state + 3 * heads + angles
    shapes = {
        "in_proj.weight": (rows, D), "out_proj.weight": (D, heads * width), "dt_bias": (heads,), "D": (heads,), "B_bias": (heads, 1, state),
        "C_bias": (heads, 1, state), "B_norm.weight": (state,), "C_norm.weight": (state,),
    }  # fmt: skip
    weights = {name: torch.randn(*shape, generator=made, dtype=torch.float64) for name, shape in shapes.items()}
    config, own = official(weights, heads, groups, width, angles)
    mixer = build_mixer(vars(config), 0).double()
    mixer.load_state_dict(own)
    u = torch.randn(2, 30, D, generator=made, dtype=torch.float64)
    assert isinstance(mixer, Mamba3)
    assert rms_error(mixer(u)[0], _published(u, weights, heads, groups, width, angles)) < 1e-12
    with pytest.raises(ValueError, match="is_outproj_norm=False"):
        official(weights | {"norm.weight": torch.ones(24)}, heads, groups, width, angles)
    with pytest.raises(ValueError, match="in_proj.weight must have"):
        official(weights, heads, groups, width, angles + 1)


def test_wrong_options_are_named() -> None:
    for options, words in (
        ({"rotary": True}, "mamba3 needs mixer.rotary=false"), ({"angles": 5}, r"mixer.angles must be from 1 to state / 2 = 4; got 5"),
        ({"conv_after_repeat": True}, "conv_after_repeat=false"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            student("mamba3", options=options)
    with pytest.raises(ValueError, match=r"S angles turn 2 S of N coordinates: got S = 3 and N = 5"):
        i = inputs()
        mamba3_scan(**(i | {"b": i["b"][..., :5], "c": i["c"][..., :5], "state": i["state"][..., :6]}))
