"""Published hybrids as students: key tables of every published configuration, and numbers against formulas written here, token by token.

Shapes: T time, D model width, H query heads, G key/value heads, P head width, N state width. One sequence at a time.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ids
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PhiConfig

import llamba
from llamba.interop import cartesia, mamba_in_llama, phi_mamba
from llamba.interop.importing import format_of, import_checkpoint, made_shapes
from llamba.interop.students import expected_tensors
from llamba.models.published import teacher_config

Shapes = dict[str, tuple[int, ...]]
EPS = 1e-5


# Names and shapes, as their code makes them.
def llama_shapes(width: int, mlp: int, layers: int, vocabulary: int, tied: bool) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    shapes |= {} if tied else {"lm_head.weight": (vocabulary, width)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        shapes |= {f"model.layers.{i}.mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (width, mlp)
    return shapes


def attention_shapes(i: int, width: int, heads: int, groups: int, head: int) -> Shapes:
    at = f"model.layers.{i}.self_attn."
    return {f"{at}q_proj.weight": (heads * head, width), f"{at}k_proj.weight": (groups * head, width),
            f"{at}v_proj.weight": (groups * head, width), f"{at}o_proj.weight": (width, heads * head)}  # fmt: skip


def mamba1_shapes(i: int, width: int, inner: int, shared: int, state: int = 16, fused: bool = False) -> Shapes:
    at, rank = f"model.layers.{i}.mamba.", -(-width // 16)
    rows = {"in_proj_z": inner, "in_proj_x": shared, "B_proj": shared, "C_proj": inner, "dt_proj_down": rank}
    projections = {"in_proj": sum(rows.values())} if fused else rows
    return {f"{at}{name}.weight": (count, width) for name, count in projections.items()} | {
        f"{at}dt_proj.weight": (inner, rank), f"{at}dt_proj.bias": (inner,), f"{at}conv1d.weight": (inner, 1, 4),
        f"{at}conv1d.bias": (inner,), f"{at}A_log": (inner, state), f"{at}D": (inner,), f"{at}out_proj.weight": (width, inner),
    }  # fmt: skip


def mamba2_shapes(i: int, width: int, inner: int, shared: int, heads: int, repeated: bool = False) -> Shapes:
    at, channels = f"model.layers.{i}.mamba.", 3 * inner if repeated else inner + 2 * shared
    return {
        f"{at}in_proj.weight": (2 * inner + 2 * shared + heads, width), f"{at}conv1d.weight": (channels, 1, 4),
        f"{at}conv1d.bias": (channels,), f"{at}dt_bias": (heads,), f"{at}A_log": (heads,), f"{at}D": (heads,), f"{at}norm.weight": (inner,),
        f"{at}out_proj.weight": (width, inner),
    }  # fmt: skip


def discrete_shapes(at: str, width: int, heads: int, head: int, state: int, shared: int) -> Shapes:
    inner, channels = heads * head, heads * head + 2 * shared * state
    return {
        f"{at}in_proj.weight": (channels + inner + heads, width), f"{at}z_bias": (inner,), f"{at}conv1d.weight": (channels, 1, 4),
        f"{at}conv1d.bias": (channels,), f"{at}D": (heads,), f"{at}out_proj.weight": (width, inner),
    }  # fmt: skip


def hybrid_llama_shapes(base: LlamaConfig, kept: list[int], kind: str, **more: Any) -> Shapes:
    c = base.to_dict()
    width, layers, heads, groups = c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"]
    head = c.get("head_dim") or width // heads
    shapes = llama_shapes(width, c["intermediate_size"], layers, c["vocab_size"], c["tie_word_embeddings"])
    for i in range(layers):
        if i in kept:
            shapes |= attention_shapes(i, width, heads, groups, head)
        elif kind == "mamba1":
            shapes |= mamba1_shapes(i, width, heads * head, groups * head, **more)
        else:
            shapes |= mamba2_shapes(i, width, heads * head, groups * head, heads, **more)
    return shapes


def phi_shapes(layers: int, kept: list[int], width: int = 2048, vocabulary: int = 51200, heads: int = 32, head: int = 64, state: int = 64,
               shared: int = 32) -> Shapes:  # fmt: skip
    shapes: Shapes = {
        "backbone.embedding.weight": (vocabulary, width),
        "lm_head.weight": (vocabulary, width),
        "lm_head.bias": (vocabulary,),
    }
    shapes |= {f"backbone.final_layernorm.{what}": (width,) for what in ("weight", "bias")}
    for i in range(layers):
        at = f"backbone.layers.{i}."
        shapes |= {f"{at}input_layernorm.{what}": (width,) for what in ("weight", "bias")}
        shapes |= {f"{at}mlp.fc1.weight": (4 * width, width), f"{at}mlp.fc1.bias": (4 * width,)}
        shapes |= {f"{at}mlp.fc2.weight": (width, 4 * width), f"{at}mlp.fc2.bias": (width,)}
        if i in kept:
            for name in ("q_proj", "k_proj", "v_proj", "dense"):
                shapes |= {f"{at}mixer.self_attn.{name}.weight": (width, width), f"{at}mixer.self_attn.{name}.bias": (width,)}
        else:
            shapes |= discrete_shapes(f"{at}mixer.", width, heads, head, state, shared)
    return shapes


def llamba_shapes(width: int, mlp: int, layers: int, tied: bool, vocabulary: int = 128256, heads: int = 32, state: int = 64) -> Shapes:
    shapes: Shapes = {"backbone.embedding.weight": (vocabulary, width), "backbone.final_layernorm.weight": (width,)}
    shapes |= {} if tied else {"lm_head.weight": (vocabulary, width)}
    for i in range(layers):
        at = f"backbone.layers.{i}."
        shapes |= {f"{at}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        shapes |= {f"{at}mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")} | {f"{at}mlp.down_proj.weight": (width, mlp)}
        shapes |= discrete_shapes(f"{at}mixer.", width, heads, width // heads, state, heads)
    return shapes


# Published configurations.
def mamba_config(base: LlamaConfig, ssm: dict[str, Any], kept: list[int], inner: int | None) -> dict[str, Any]:
    c = base.to_dict()
    head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    return {
        "d_model": c["hidden_size"], "ssm_cfg": ssm, "rms_norm_eps": c["rms_norm_eps"], "vocab_size": None, "d_inner": inner,
        "d_xb": c["num_key_value_heads"] * head, "intermediate_size": c["intermediate_size"], "hidden_act": c["hidden_act"],
        "n_layer": c["num_hidden_layers"], "attn_layers": kept,
    }  # fmt: skip


MAMBA_IN_LLAMA: dict[str, tuple[str, dict[str, Any], list[int], int | None]] = {  # base, ssm_cfg, attention kept, d_inner
    "JunxiongWang/Llama3.1-Mamba-8B-distill": ("llama-3.1-8b", {"expand": 1}, list(range(1, 32, 2)), None),
    "JunxiongWang/Mamba2InLlama_0_75": ("meta-llama-3-8b", {"expand": 1, "ngroups": 32, "d_state": 128}, list(range(3, 32, 4)), 4096),
    "JunxiongWang/Mamba2InLlama_1": ("meta-llama-3-8b", {"expand": 1, "ngroups": 32, "d_state": 128}, [], 4096),
    "JunxiongWang/MambaInZephyr_0_875": ("zephyr-7b-beta", {"expand": 1}, [7, 15, 23, 31], None),
    "JunxiongWang/Llama3.2-Mamba2-3B-distill": ("llama-3.2-3b", {"expand": 1, "ngroups": 24, "d_state": 128}, list(range(1, 28, 2)), 3072),
    "togethercomputer/MambaInLlama3B": ("llama-3.2-3b", {"expand": 1}, [6, 13, 20, 27], 3072),
    "JunxiongWang/M1-3B": ("llama-3.2-3b", {"expand": 1}, [3, 8, 13, 18, 23, 27], 3072),
}
CORE = {"d_state": 64, "n_v_heads": 32, "n_qk_heads": 32, "d_conv": 4, "conv_bias": True, "expand": 1, "chunk_size": 128,
        "activation": "identity", "bias": False}  # fmt: skip


def phi_config(pattern: list[tuple[int, str]], width: int = 2048, vocabulary: int = 51200, core: dict[str, Any] = CORE) -> dict[str, Any]:
    values: dict[str, Any] = {
        "LanguageModel": {"input": {"vocab_size": vocabulary, "pad_vocab_size_multiple": 8}},
        "MixerModel": {"input": {"d_model": width, "n_layer": sum(n for n, _ in pattern), "lm_head_prenorm": "layer"}},
    }
    for number, (layers, kind) in enumerate(pattern):
        mixer = kind == "mixer"
        values[f"Block{number + 1}"] = {
            "n_layers": layers, "BlockType": "modules.phi_block", "block_input": {"resid_dropout": 0.0},
            "CoreType": "modules.mixers.discrete_mamba2" if mixer else "modules.mixers.phi_attention",
            "core_input": core if mixer else {"num_attention_heads": 4} if width != 2048 else {},
        }  # fmt: skip
    return values


HYBRID_PHI = [(4, "mixer"), (1, "attention"), (5, "mixer"), (1, "attention"), (5, "mixer"), (1, "attention"), (5, "mixer"),
              (1, "attention"), (1, "mixer")]  # fmt: skip
LLAMBA = {"1B": (2048, 8192, 16, True), "3B": (3072, 8192, 28, True), "8B": (4096, 14336, 32, False)}  # width, MLP, layers, tied


class Places:
    """Shapes without weights, as an importer asks for them."""

    def __init__(self, shapes: Shapes):
        self.shapes = shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def __getitem__(self, name: str) -> tuple["Places", str]:
        return self, name


def fits(made: Any, shapes: Shapes) -> None:
    """Every tensor of the checkpoint is used, and ours are exactly those of the student's configuration."""
    assert {name for take in made.table.values() for name in take.names} == shapes.keys()
    assert made_shapes(made, Places(shapes)) == expected_tensors(made.config)


@pytest.mark.parametrize("name", MAMBA_IN_LLAMA)
def test_every_published_mamba_in_llama_has_its_place(name: str) -> None:
    base_name, ssm, kept, inner = MAMBA_IN_LLAMA[name]
    base = teacher_config(base_name)
    kind = "mamba2" if "ngroups" in ssm else "mamba1"
    shapes = hybrid_llama_shapes(base, kept, kind, **({"fused": True} if "M1" in name else {}))
    made = mamba_in_llama.published(teacher_config(base_name), mamba_config(base, ssm, kept, inner), shapes)
    fits(made, shapes)
    assert [i for i, layer in enumerate(made.config.layer_types) if layer != "linear_attention"] == kept
    mixer = made.config.mixer
    assert mixer["kind"] == kind and (kind == "mamba2" or (mixer["double_dt_bias"] and mixer["block_gqa"] and mixer["state"] == 16))


@pytest.mark.parametrize("pattern", [[(24, "mixer")], HYBRID_PHI], ids=["Phi-Mamba", "Hybrid-Phi-Mamba"])
def test_every_published_phi_mamba_has_its_place(pattern: list[tuple[int, str]]) -> None:
    kept = [] if len(pattern) == 1 else [4, 10, 16, 22]
    shapes = phi_shapes(24, kept)
    made = phi_mamba.published(phi_config(pattern), shapes)
    fits(made, shapes)
    assert [i for i, layer in enumerate(made.config.layer_types) if layer != "linear_attention"] == kept
    assert made.config.rope_parameters == PhiConfig().rope_parameters and made.config.num_attention_heads == 32


@pytest.mark.parametrize("size", LLAMBA)
def test_every_published_llamba_has_its_place(size: str) -> None:
    width, mlp, layers, tied = LLAMBA[size]
    values = {"model_type": "llamba", "vocab_size": 128256, "d_model": width, "n_layer": layers, "tie_embeddings": tied,
              "lm_head_bias": False, "norm_epsilon": 1e-5, "mlp_cfg": {"intermediate_size": mlp, "bias": False, "act_fn": "silu"},
              "ssm_cfg": {key: CORE[key] for key in CORE if key not in ("d_conv", "conv_bias")}}  # fmt: skip
    shapes = llamba_shapes(width, mlp, layers, tied)
    made = cartesia.published(values, shapes)
    fits(made, shapes)
    assert (made.config.mixer["head_dim"], made.config.mixer["state"]) == (width // 32, 64)


# The models, token by token in fp64, from their own names.
def random_weights(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        scale = 0.4 if "conv1d" in name else shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        weights[name] = (drawn * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0)).float()
        if name.endswith(("dt_bias", "dt_proj.bias")):
            weights[name] -= 1
    return weights


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # [T, C] -> [T, C]
    rows = torch.cat((x.new_zeros(3, x.shape[1]), x))
    return torch.stack([(rows[t : t + 4] * weight[:, 0].T).sum(0) + bias for t in range(len(x))])


def attended(u: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int, groups: int, rotary: int, theta: float = 10000.0) -> Tensor:
    """Softmax attention of one sequence; the first `rotary` coordinates of each head are turned."""
    T, P = len(u), q.shape[-1] // heads
    angles = torch.arange(T).double()[:, None] * theta ** (-torch.arange(0, rotary, 2).double() / rotary)  # [T, rotary / 2]

    def turned(x: Tensor) -> Tensor:  # [T, heads, P]
        one, two, rest = x.split([rotary // 2, rotary // 2, P - rotary], -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((one * cos - two * sin, two * cos + one * sin, rest), -1)

    q, k, v = turned(q.view(T, heads, P)), turned(k.view(T, groups, P)), v.view(T, groups, P)
    out = []
    for h in range(heads):
        g = h * groups // heads
        scores = (q[:, h] @ k[:, g].T / P**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        out.append(scores.softmax(-1) @ v[:, g])
    return torch.cat(out, -1)


def mamba1_layer(w: dict[str, Tensor], u: Tensor, state: int = 16) -> Tensor:
    x, z, b, c = (u @ w[f"{name}.weight"].T for name in ("in_proj_x", "in_proj_z", "B_proj", "C_proj"))
    dt = u @ w["dt_proj_down.weight"].T @ w["dt_proj.weight"].T + w["dt_proj.bias"]
    share = z.shape[1] // x.shape[1]
    x = x.view(len(u), -1, state).repeat_interleave(share, 1).flatten(1)  # blocks of 16 coordinates
    b = b.view(len(u), -1, state).repeat_interleave(share, 1)
    c, x = c.view(len(u), -1, state), F.silu(convolved(x, w["conv1d.weight"], w["conv1d.bias"]))
    h, out = x.new_zeros(x.shape[1], state), []
    for t in range(len(u)):
        step = F.softplus(dt[t] + w["dt_proj.bias"])[:, None]  # the bias a second time
        h = (-w["A_log"].exp() * step).exp() * h + step * x[t][:, None] * b[t].repeat_interleave(state, 0)
        out.append((h * c[t].repeat_interleave(state, 0)).sum(-1) + w["D"] * x[t])
    return torch.stack(out) * F.silu(z) @ w["out_proj.weight"].T


def mamba2_layer(w: dict[str, Tensor], u: Tensor, heads: int, width: int, groups: int, repeated: bool) -> Tensor:
    inner, shared = heads * width, groups * width
    z, x, b, c, dt = (u @ w["in_proj.weight"].T).split([inner, shared, shared, inner, heads], -1)

    def spread(part: Tensor) -> Tensor:
        return part.view(len(u), groups, width).repeat_interleave(heads // groups, 1).flatten(1)

    together = torch.cat((spread(x), spread(b), c) if repeated else (x, b, c), -1)
    together = F.silu(convolved(together, w["conv1d.weight"], w["conv1d.bias"]))
    x, b, c = together.split([inner, inner, inner] if repeated else [shared, shared, inner], -1)
    x, b, c = (part.view(len(u), heads, width) for part in (x if repeated else spread(x), b if repeated else spread(b), c))
    h, out = x.new_zeros(heads, width, width), []
    for t in range(len(u)):
        step = F.softplus(dt[t] + w["dt_bias"])
        h = (-w["A_log"].exp() * step).exp()[:, None, None] * h + (step[:, None] * x[t])[:, :, None] * b[t][:, None]
        out.append((h * c[t][:, None]).sum(-1) + w["D"][:, None] * x[t])
    gated = torch.stack(out) * F.silu(z).view(len(u), heads, width)
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + EPS)
    return (normed.flatten(1) * w["norm.weight"]) @ w["out_proj.weight"].T


def discrete_layer(w: dict[str, Tensor], u: Tensor, heads: int, width: int, state: int, shared: int, activation: Any) -> Tensor:
    inner = heads * width
    x, b, c, z, a = (u @ w["in_proj.weight"].T).split([inner, shared * state, shared * state, inner, heads], -1)
    together = activation(convolved(torch.cat((x, b, c), -1), w["conv1d.weight"], w["conv1d.bias"]))
    x, b, c = together.split([inner, shared * state, shared * state], -1)
    x = x.view(len(u), heads, width)
    b, c = (part.view(len(u), shared, state).repeat_interleave(heads // shared, 1) for part in (b, c))
    h, out = x.new_zeros(heads, width, state), []
    for t in range(len(u)):
        h = torch.sigmoid(-a[t])[:, None, None] * h + x[t][:, :, None] * b[t][:, None]
        out.append((h * c[t][:, None]).sum(-1) + w["D"][:, None] * x[t])
    return torch.stack(out).flatten(1) * F.silu(z + w["z_bias"]) @ w["out_proj.weight"].T


def under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def llama_logits(weights: dict[str, Tensor], tokens: Tensor, mixed: Callable[[int, dict[str, Tensor], Tensor], Tensor], at: str) -> Tensor:
    """A Llama's logits [T, V] around whatever stands for attention, in fp64; `at` is the prefix of the body's names."""
    w = {name: value.double() for name, value in weights.items()}
    embedding = next(w[name] for name in (f"{at}embed_tokens.weight", f"{at}embedding.weight") if name in w)
    x = embedding[tokens]
    for i in range(1 + max(int(found[1]) for name in w if (found := re.search(r"layers\.(\d+)\.", name)))):
        layer = under(w, f"{at}layers.{i}.")
        x = x + mixed(i, layer, rms(x, layer["input_layernorm.weight"]))
        u = rms(x, layer["post_attention_layernorm.weight"])
        gate, up = u @ layer["mlp.gate_proj.weight"].T, u @ layer["mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ layer["mlp.down_proj.weight"].T
    norm = next(w[name] for name in (f"{at}norm.weight", f"{at}final_layernorm.weight") if name in w)
    return rms(x, norm) @ w.get("lm_head.weight", embedding).T


def phi_logits(weights: dict[str, Tensor], tokens: Tensor, kept: list[int], heads: int, mixed: Callable[..., Tensor]) -> Tensor:
    w = {name: value.double() for name, value in weights.items()}
    x = w["backbone.embedding.weight"][tokens]
    width = x.shape[1]
    for i in range(4):
        layer = under(w, f"backbone.layers.{i}.")
        u = F.layer_norm(x, (width,), layer["input_layernorm.weight"], layer["input_layernorm.bias"], EPS)
        if i in kept:
            a = under(layer, "mixer.self_attn.")
            q, k, v = (u @ a[f"{name}_proj.weight"].T + a[f"{name}_proj.bias"] for name in "qkv")
            mixer = attended(u, q, k, v, heads, heads, width // heads // 2) @ a["dense.weight"].T + a["dense.bias"]
        else:
            mixer = mixed(under(layer, "mixer."), u)
        mlp = F.gelu(u @ layer["mlp.fc1.weight"].T + layer["mlp.fc1.bias"], approximate="tanh")
        x = x + mixer + mlp @ layer["mlp.fc2.weight"].T + layer["mlp.fc2.bias"]
    last = F.layer_norm(x, (width,), w["backbone.final_layernorm.weight"], w["backbone.final_layernorm.bias"], EPS)
    return last @ w["lm_head.weight"].T + w["lm_head.bias"]


def agrees(folder: Path, want: Callable[[Tensor], Tensor], vocabulary: int = 101) -> Any:
    """The imported student's logits are the formula's, whole and token by token from its cache; and a draft changes no token."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = ids(1, 24)
    with torch.no_grad():
        logits, expected = model(tokens).logits[0], want(tokens[0])
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        cache, steps = None, []
        for t in range(tokens.shape[1]):
            out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache, steps = out.past_key_values, [*steps, out.logits[0, 0]]
        assert (torch.stack(steps) - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.generation_config.eos_token_id = None
    plain = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    fast = llamba.speculative.generate(model, tokens, max_new_tokens=8)
    assert fast.sequences.tolist() == plain.tolist()
    return model


D, L, V, H, G = 64, 4, 101, 2, 1
KEPT = [1, 3]
BASE = dict(vocab_size=V, hidden_size=D, intermediate_size=96, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=G,
            rms_norm_eps=EPS, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip


def written(folder: Path, weights: dict[str, Tensor], how: str) -> Path:
    """Weights as their code writes them."""
    folder.mkdir(exist_ok=True)
    if how == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    elif how == "whole":
        save_file(weights, folder / "model.safetensors")
    else:
        names = sorted(weights)
        parts = {f"model-{k + 1:05d}-of-00003.safetensors": names[k::3] for k in range(3)}
        for name, held in parts.items():
            save_file({key: weights[key] for key in held}, folder / name)
        if how == "sharded":  # their own loader takes all files, with or without an index
            where = {key: name for name, held in parts.items() for key in held}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def attention_of(layer: dict[str, Tensor], u: Tensor) -> Tensor:
    q, k, v = (u @ layer[f"self_attn.{name}_proj.weight"].T for name in "qkv")
    return attended(u, q, k, v, H, G, D // H) @ layer["self_attn.o_proj.weight"].T


def mamba_in_llama_folder(folder: Path, weights: dict[str, Tensor], ssm: dict[str, Any], how: str, **more: Any) -> Path:
    written(folder, weights, how)
    base = LlamaConfig(**{**BASE, "architectures": ["LlamaForCausalLM"], **more})
    base.save_pretrained(folder)
    (folder / "mamba_config.json").write_text(json.dumps(mamba_config(base, ssm, KEPT, None if ssm.get("ngroups") is None else D)))
    return folder


@pytest.mark.parametrize(("how", "fused"), [("bin", False), ("sharded", True)])
def test_mamba1_in_llama(tmp_path: Path, how: str, fused: bool) -> None:
    weights = random_weights(hybrid_llama_shapes(LlamaConfig(**BASE), KEPT, "mamba1"))

    def want(tokens: Tensor) -> Tensor:
        return llama_logits(
            weights, tokens, lambda i, w, u: attention_of(w, u) if i in KEPT else mamba1_layer(under(w, "mamba."), u), "model."
        )

    theirs = dict(weights)
    for i in (0, 2) if fused else ():
        names = [f"model.layers.{i}.mamba.{name}.weight" for name in ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")]
        theirs[f"model.layers.{i}.mamba.in_proj.weight"] = torch.cat([theirs.pop(name) for name in names])
    folder = mamba_in_llama_folder(tmp_path / "theirs", theirs, {"expand": 1}, how)
    said = str(import_checkpoint(folder, tmp_path / "ours"))
    assert "2 of 4 layers recurrent" in said and "added twice" in said and "blocks of 16" in said and "no tokenizer" in said
    agrees(tmp_path / "ours", want)


@pytest.mark.parametrize(("how", "repeated"), [("whole", False), ("loose", True)])
def test_mamba2_in_llama(tmp_path: Path, how: str, repeated: bool) -> None:
    weights = random_weights(hybrid_llama_shapes(LlamaConfig(**BASE, tie_word_embeddings=True), KEPT, "mamba2", repeated=repeated))

    def want(tokens: Tensor) -> Tensor:
        return llama_logits(
            weights, tokens,
            lambda i, w, u: attention_of(w, u) if i in KEPT else mamba2_layer(under(w, "mamba."), u, H, D // H, G, repeated), "model.",
        )  # fmt: skip

    ssm = {"expand": 1, "ngroups": H, "d_state": D // H} | ({"repeat_kv_before_conv": True} if repeated else {})
    folder = mamba_in_llama_folder(tmp_path / "theirs", weights, ssm, how, tie_word_embeddings=True)
    said = str(import_checkpoint(folder, tmp_path / "ours"))
    assert "epsilon 1e-05" in said and ("behind the repeat" in said) == repeated
    agrees(tmp_path / "ours", want)


def test_m1_with_fused_attention(tmp_path: Path) -> None:
    """Kept attention fused as mamba_ssm's; it rotates by rope_theta alone, whatever scaling the base model's configuration asks for."""
    weights = random_weights(hybrid_llama_shapes(LlamaConfig(**BASE), KEPT, "mamba2"))

    def want(tokens: Tensor) -> Tensor:
        return llama_logits(
            weights, tokens,
            lambda i, w, u: attention_of(w, u) if i in KEPT else mamba2_layer(under(w, "mamba."), u, H, D // H, G, False), "model.",
        )  # fmt: skip

    theirs = dict(weights)
    for i in KEPT:
        at = f"model.layers.{i}."
        theirs[f"{at}mha.in_proj.weight"] = torch.cat([theirs.pop(f"{at}self_attn.{name}_proj.weight") for name in "qkv"])
        theirs[f"{at}mha.out_proj.weight"] = theirs.pop(f"{at}self_attn.o_proj.weight")
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip
    ssm = {"expand": 1, "ngroups": H, "d_state": D // H}
    folder = mamba_in_llama_folder(tmp_path / "theirs", theirs, ssm, "whole", rope_parameters=rope)
    assert "rotate without" in str(import_checkpoint(folder, tmp_path / "ours"))
    agrees(tmp_path / "ours", want)


@pytest.mark.parametrize("changes", [{}, {"n_qk_heads": 2}, {"activation": "silu"}], ids=["published", "shared heads", "silu"])
def test_hybrid_phi_mamba(tmp_path: Path, changes: dict[str, Any]) -> None:
    core = CORE | {"n_v_heads": 4, "n_qk_heads": 4, "d_state": 8} | changes
    heads, shared, kept = 4, core["n_qk_heads"], [2]
    weights = random_weights(phi_shapes(4, kept, D, 104, heads, D // heads, 8, shared))
    activation = F.silu if changes.get("activation") else lambda x: x
    folder = written(tmp_path / "theirs", weights, "bin")
    pattern = [(2, "mixer"), (1, "attention"), (1, "mixer")]
    (folder / "config.json").write_text(json.dumps(phi_config(pattern, D, V, core)))  # the vocabulary is padded to a multiple of 8
    said = str(import_checkpoint(folder, tmp_path / "ours"))
    assert "Hybrid-Phi-Mamba, 3 of 4" in said and "microsoft/phi-1_5" in said
    agrees(
        tmp_path / "ours",
        lambda tokens: phi_logits(weights, tokens, kept, 4, lambda w, u: discrete_layer(w, u, heads, D // heads, 8, shared, activation)),
    )


@pytest.mark.parametrize("tied", [True, False])
def test_llamba_whose_state_is_narrower_than_its_heads(tmp_path: Path, tied: bool) -> None:
    weights = random_weights(llamba_shapes(D, 96, 3, tied, 104, 4, 8))
    folder = written(tmp_path / "theirs", weights, "whole")
    core = CORE | {"n_v_heads": 4, "n_qk_heads": 4, "d_state": 8}
    values = {"model_type": "llamba", "vocab_size": V, "pad_vocab_size_multiple": 4, "d_model": D, "n_layer": 3, "tie_embeddings": tied,
              "mlp_cfg": {"intermediate_size": 96, "bias": False, "act_fn": "silu"}, "ssm_cfg": core}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    import_checkpoint(folder, tmp_path / "ours")

    def mixed(i: int, w: dict[str, Tensor], u: Tensor) -> Tensor:
        return discrete_layer(under(w, "mixer."), u, 4, D // 4, 8, 4, lambda x: x)

    def want(tokens: Tensor) -> Tensor:
        return llama_logits(weights, tokens, mixed, "backbone.")

    agrees(tmp_path / "ours", want)


def a_folder(tmp_path: Path, **files: dict[str, Any]) -> Path:
    for name, values in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    return tmp_path


def test_what_cannot_be_imported_is_refused_by_name(tmp_path: Path) -> None:
    cases = {
        "Zebra-Llama": {"config": {"model_type": "llama"}, "hybrid_config": {"mla_layers": [1]}},
        "Apriel-H1": {"config": {"model_type": "apriel_hybrid_ssm"}},
        "a student of llamba already": {"config": {"model_type": "llamba_llama"}},
        "known format": {"config": {"model_type": "rene"}},
    }
    for number, (words, files) in enumerate(cases.items()):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(ValueError, match=words):
            format_of(a_folder(tmp_path / str(number), **files))
    with pytest.raises(ValueError, match="quantised for MLX"):
        cartesia.published({"model_type": "llamba", "d_model": 64, "vocab_size": 8}, {"backbone.layers.0.mixer.in_proj.scales": (1,)})
    with pytest.raises(ValueError, match="norm_before_gate"):
        base = LlamaConfig(**BASE)
        own = mamba_config(base, {"ngroups": H, "d_state": D // H, "norm_before_gate": True}, KEPT, D)
        mamba_in_llama.published(base, own, {})
    with pytest.raises(ValueError, match="must agree; rms_norm_eps"):
        mamba_in_llama.published(MistralConfig(**BASE), mamba_config(base, {}, KEPT, None) | {"rms_norm_eps": 1e-6}, {})


def test_missing_surplus_and_odd_tensors_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    shapes = hybrid_llama_shapes(LlamaConfig(**BASE), KEPT, "mamba1")
    weights, ssm = random_weights(shapes), {"expand": 1}
    changes: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        r"1 missing \(model.layers.2.mamba.D\)": lambda w: w.pop("model.layers.2.mamba.D"),
        r"1 surplus \(model.layers.0.mamba.more\)": lambda w: w.update({"model.layers.0.mamba.more": torch.ones(1)}),
        r"1 of another shape \(model.layers.0.self_attn.A_log: needed \[64, 16\], got \[64, 8\]\)": lambda w: w.update(
            {"model.layers.0.mamba.A_log": torch.ones(64, 8)}
        ),
        r"1 missing \(model.norm.weight\); the base model's folder": lambda w: w.pop("model.norm.weight"),
    }
    for number, (words, change) in enumerate(changes.items()):
        broken = dict(weights)
        change(broken)
        folder = mamba_in_llama_folder(tmp_path / str(number), broken, ssm, "whole")
        with pytest.raises(ValueError, match=words):
            import_checkpoint(folder, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]
    save_file({"model.norm.weight": weights["model.norm.weight"]}, tmp_path / "0" / "model.safetensors")
    import_checkpoint(tmp_path / "3", tmp_path / "ours", base=tmp_path / "0")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "ours").model.norm.weight, weights["model.norm.weight"])


def test_a_pickle_that_does_more_than_hold_tensors_is_not_run(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = mamba_in_llama_folder(tmp_path / "theirs", {}, {"expand": 1}, "whole")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Runs()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="weights_only=True"):
        import_checkpoint(folder, tmp_path / "ours")
    assert not (tmp_path / "ran").exists()
