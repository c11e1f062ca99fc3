"""Mixers against the teacher's own matrices: what a mixer is when it may not forget is linear attention, exactly."""

import math

import pytest
import torch
from models import LATER, MIXERS, TEACHERS, rms_error, teacher
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llamba.models.convert import convert
from llamba.models.families import family_of
from llamba.models.mixers import INITS, MixerConfig, build_mixer, initialise
from llamba.models.mixers.initial import OPEN_GATE


def exact_norm(norm: nn.Module, heads: Tensor) -> Tensor:
    """The teacher's query or key norm in fp64 (transformers' own RMSNorm computes in fp32)."""
    if isinstance(norm, nn.LayerNorm):
        return nn.functional.layer_norm(heads, heads.shape[-1:], norm.weight, norm.bias, norm.eps)
    return heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight


def turned(heads: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """heads [B, H, T, P], of which the first coordinates are turned, as transformers does it."""
    cos, sin = angles
    part, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    return torch.cat((apply_rotary_pos_emb(part, part, cos, sin)[0], rest), -1)


def linear_attention(attention: nn.Module, u: Tensor, heads: int, groups: int, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """tril(Q K^T) V O^T + b_o per head from the attention module's own matrices; unscaled, turned by `angles` if there are any."""
    parts = dict(attention.named_children())
    q, k, v = (parts[name](u).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
    for name in ("q_norm", "q_layernorm"):
        q = exact_norm(parts[name], q) if name in parts else q
    for name in ("k_norm", "k_layernorm"):
        k = exact_norm(parts[name], k) if name in parts else k
    if angles is not None:
        q, k = turned(q, angles), turned(k, angles)
    outputs = []
    for h in range(heads):
        g = h * groups // heads
        outputs.append((q[:, h] @ k[:, g].transpose(1, 2)).tril() @ v[:, g])
    return (parts.get("o_proj") or parts["dense"])(torch.cat(outputs, -1))


@pytest.mark.parametrize("groups", [4, 2], ids=["H=G", "H>G"])
@pytest.mark.parametrize("mixer", (*MIXERS, *LATER))
@pytest.mark.parametrize("name", TEACHERS)
def test_without_decay_a_mixer_is_the_teachers_linear_attention(name: str, mixer: str, groups: int) -> None:
    source = teacher(name, groups)
    shape = family_of(source.config).shape(source.config)
    options = {"conv_activation": None, "out_norm": False, "state": shape["head_dim"]}
    made = convert(source, mixer=mixer, attention=0.0, init="linear_attention", options=options)
    u = torch.randn(2, 70, 32, dtype=torch.float64)
    for before, after in zip(source.model.layers, made.model.layers, strict=True):
        want = linear_attention(before.self_attn, u, shape["heads"], shape["groups"])
        got, weights = after.self_attn(hidden_states=u)
        assert weights is None
        assert (got - want).abs().max() <= 1e-9 * want.abs().max()


def test_the_families_above_cover_what_they_should() -> None:
    sources = {name: teacher(name) for name in TEACHERS}
    shapes = {name: family_of(source.config).shape(source.config) for name, source in sources.items()}
    assert {family_of(source.config).config.model_type for source in sources.values()} == {
        "llamba_llama", "llamba_mistral", "llamba_phi", "llamba_qwen2", "llamba_qwen3"
    }  # fmt: skip
    assert any(shape["heads"] * shape["head_dim"] != shape["hidden_size"] for shape in shapes.values())
    assert {shape["qk_norm"] for shape in shapes.values()} == {None, "rms", "layer"}
    assert sources["qwen2"].model.layers[0].self_attn.q_proj.bias is not None


@pytest.mark.parametrize("mixer", (*MIXERS, *LATER))
def test_a_wrong_key_value_head_is_noticed(mixer: str) -> None:
    """The oracle above can fail: with the key rows of the two groups exchanged it does."""
    source = teacher("llama", 2)
    made = convert(
        source, mixer=mixer, attention=0.0, init="linear_attention", options={"conv_activation": None, "out_norm": False, "state": 8}
    )
    attention = source.model.layers[0].self_attn
    attention.k_proj.weight.data = attention.k_proj.weight.data.roll(8, 0)
    u = torch.randn(1, 20, 32, dtype=torch.float64)
    assert rms_error(made.model.layers[0].self_attn(u)[0], linear_attention(attention, u, 4, 2)) > 0.1


def test_mamba1_with_narrow_state_pairs_coordinates_of_the_same_head() -> None:
    """State 4, head width 8: sub-head s of head h is linear attention over coordinates 4s..4s+3 of that head's own q, k and v."""
    source = teacher("llama", 2)
    options = {"conv_activation": None, "out_norm": False, "state": 4}
    made = convert(source, mixer="mamba1", attention=0.0, init="linear_attention", options=options)
    attention, u = source.model.layers[0].self_attn, torch.randn(1, 30, 32, dtype=torch.float64)
    q, k, v = (getattr(attention, f"{n}_proj")(u).unflatten(-1, (-1, 8)) for n in "qkv")
    outputs = []
    for h in range(4):
        for s in (slice(0, 4), slice(4, 8)):
            outputs.append((q[:, :, h, s] @ k[:, :, h // 2, s].transpose(1, 2)).tril() @ v[:, :, h // 2, s])
    want = attention.o_proj(torch.cat(outputs, -1))
    assert rms_error(made.model.layers[0].self_attn(u)[0], want) < 1e-9


def config(kind: str, **more) -> MixerConfig:
    values = {"hidden_size": 32, "heads": 4, "groups": 2, "head_dim": 8, "state": 8, "dt_rank": 2, "out_norm": kind == "mamba2"}
    return MixerConfig(kind=kind, **{**values, **more})


@pytest.mark.parametrize("mixer", MIXERS)
def test_convolution_after_the_repeat_is_the_convolution_before_it_with_repeated_channels(mixer: str) -> None:
    torch.manual_seed(0)
    before = build_mixer(vars(config(mixer)), 0).double()
    initialise(before, None, "paper", torch.Generator().manual_seed(0))
    after = build_mixer(vars(config(mixer, conv_after_repeat=True)), 0).double()
    state = before.state_dict()
    for name in ("conv1d.weight", "conv1d.bias"):
        heads = state[name].unflatten(0, (-1, 8))
        shared = [heads[i : i + 2].repeat_interleave(2, 0) for i in ((0,) if mixer == "mamba1" else (0, 2))]
        state[name] = torch.cat(shared + ([] if mixer == "mamba1" else [heads[4:]])).flatten(0, 1)
    after.load_state_dict(state)
    u = torch.randn(2, 21, 32, dtype=torch.float64)
    assert rms_error(after(u)[0], before(u)[0]) < 1e-12


def test_published_mamba1_behaviour_is_a_switch() -> None:
    """The step bias counts twice, and key/value heads expand in blocks of N coordinates."""
    plain = build_mixer(vars(config("mamba1", state=4)), 0).double()
    initialise(plain, None, "paper", torch.Generator().manual_seed(0))
    u = torch.randn(1, 9, 32, dtype=torch.float64)
    twice = build_mixer(vars(config("mamba1", state=4, double_dt_bias=True)), 0).double()
    twice.load_state_dict(plain.state_dict())
    assert rms_error(twice(u)[0], plain(u)[0]) > 1e-3
    twice.dt_bias.data = plain.dt_bias.data / 2
    assert rms_error(twice(u)[0], plain(u)[0]) < 1e-12
    blocks = build_mixer(vars(config("mamba1", state=4, block_gqa=True)), 0).double()
    shared = torch.arange(16.0)
    want = torch.cat([shared[i : i + 4].repeat(2) for i in range(0, 16, 4)])
    assert torch.equal(blocks._repeat(shared), want)


def test_the_gate_starts_open_and_the_published_start_is_there() -> None:
    assert set(INITS) == {"attention", "paper", "mohawk", "random", "linear_attention"}
    assert abs(nn.functional.silu(torch.tensor(OPEN_GATE, dtype=torch.float64)) - 1) < 1e-13
    source = teacher("llama", 2, torch.float32)
    made = {init: convert(source, attention=0.5, init=init).model.layers[0].self_attn for init in INITS}
    v = source.model.layers[0].self_attn.v_proj.weight
    for init, mixer in made.items():
        assert torch.equal(mixer.in_proj.weight[32:48], v) == (init not in ("random", "mohawk"))
        assert bool((mixer.D == (1 if init in ("paper", "mohawk", "random") else 0)).all())
    steps = nn.functional.softplus(made["paper"].dt_bias)
    assert bool(((steps > 0.99e-3) & (steps < 1.01e-1)).all())
    assert bool(((made["paper"].A_log.exp() >= 1) & (made["paper"].A_log.exp() <= 16)).all())
    alone = convert(source, mixer="mamba2", attention=0.5).model.layers[0].self_attn
    for mixer, first, last in ((alone, 16, 2048), (made["attention"], 512, 8192)):
        memories = (1 / nn.functional.softplus(mixer.dt_bias)).sort().values
        assert torch.allclose(memories.log(), torch.linspace(math.log(first), math.log(last), 4), atol=1e-3)
    assert torch.equal(convert(source, init="paper", seed=3).model.layers[0].self_attn.A_log,
                       convert(source, init="paper", seed=3).model.layers[0].self_attn.A_log)  # fmt: skip


@pytest.mark.parametrize("mixer", MIXERS)
def test_casting_leaves_decay_parameters_in_fp32(mixer: str) -> None:
    made = build_mixer(vars(config(mixer)), 0)
    made.dt_bias.data.fill_(1.0009765625)
    made.to(torch.bfloat16)
    kept = {name for name, value in made.named_parameters() if value.dtype == torch.float32}
    assert kept == {"dt_bias", "D"} | ({"A_log"} if mixer != "discrete_mamba2" else set())
    assert made.dt_bias[0] == 1.0009765625
    y, _ = made(torch.randn(1, 5, 32, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "multiple of mixer.groups"),
        ({"conv_activation": "gelu"}, "conv_activation"),
        ({"qk_norm": "batch"}, "qk_norm"),
        ({"conv_width": 0}, "conv_width"),
    ],
)
def test_bad_configurations_say_what_was_needed(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config("mamba2", **change)


def test_a_teacher_with_biases_needs_them() -> None:
    with pytest.raises(ValueError, match="has a bias; the mixer needs proj_bias=true"):
        convert(teacher("phi"), mixer="mamba2", options={"proj_bias": False})


def test_state_width_must_fit_the_kind() -> None:
    with pytest.raises(ValueError, match="state = head_dim"):
        convert(teacher(), mixer="mamba2", options={"state": 4})
    with pytest.raises(ValueError, match="state = head_dim"):
        build_mixer(vars(config("mamba2", state=4, qk_norm="rms")), 0)
    with pytest.raises(ValueError, match="multiple of state"):
        build_mixer(vars(config("mamba1", state=3)), 0)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_gate_without_a_bias_starts_open(name: str) -> None:
    """On tokens that conversion did not see, every channel's gate is near SiLU(OPEN_GATE) = 1; and no random number elsewhere moves."""
    source = teacher(name)
    with torch.no_grad():  # inputs with a mean, as trained models have
        for layer in source.base_model.layers:
            layer.input_layernorm.weight.add_(1)
        source.get_input_embeddings().weight.add_(torch.linspace(-1, 1, 32, dtype=torch.float64))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    student = convert(source, mixer="mamba2", attention=[1, 3], options={"proj_bias": False})
    assert torch.equal(before, torch.random.get_rng_state())
    seen: dict[int, Tensor] = {}
    for index in (0, 2):
        mixer = student.model.layers[index].self_attn
        assert mixer.in_proj.bias is None
        mixer.register_forward_pre_hook(lambda m, a, k, i=index: seen.update({i: k["hidden_states"]}), with_kwargs=True)
    student(torch.randint(3, 101, (2, 50), generator=torch.Generator().manual_seed(9)))
    mixer = student.model.layers[0].self_attn
    opened = nn.functional.silu(seen[0] @ mixer.in_proj.weight[: mixer.config.inner].T)
    assert opened.min() > 0.3 and abs(opened.mean() - 1) < 0.2
    assert "open gate on 8 x 128 tokens" in str(student.conversion)
