"""Checkpoints of Mamba-in-the-Llama (arXiv 2408.15237) and M1 (arXiv 2504.10449): a `mamba_config.json` beside the transformer's.

Shapes: D model width, H query heads, G key/value heads, P head width, N state width, W convolution width. A Mamba-1 layer of theirs has
N = 16 and repeats x and B in blocks of N coordinates; a Mamba-2 layer has P = N.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from llamba.base.foreign import read_object
from llamba.interop.published import Published, Shapes, Take, same, stacked
from llamba.models.convert import student_config
from llamba.models.families import family_of
from llamba.models.loading import load_config

CONFIG = "mamba_config.json"
NORM_EPS = 1e-5  # of the norm behind the gate, whatever the model's own
MODEL = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
AROUND = ("input_layernorm.weight", "post_attention_layernorm.weight", *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")))

# Our names in a layer <- theirs. Several are stacked in this order: z | x | B | C | dt.
MAMBA1_TRAINING: dict[str, tuple[str, ...]] = {
    "self_attn.in_proj.weight": (
        "mamba.in_proj_z.weight", "mamba.in_proj_x.weight", "mamba.B_proj.weight", "mamba.C_proj.weight", "mamba.dt_proj_down.weight",
    ),
}  # fmt: skip
MAMBA1_FUSED: dict[str, tuple[str, ...]] = {"self_attn.in_proj.weight": ("mamba.in_proj.weight",)}
MAMBA1: dict[str, tuple[str, ...]] = {
    "self_attn.dt_proj.weight": ("mamba.dt_proj.weight",),
    "self_attn.dt_bias": ("mamba.dt_proj.bias",),
    "self_attn.conv1d.weight": ("mamba.conv1d.weight",),
    "self_attn.A_log": ("mamba.A_log",),
    "self_attn.D": ("mamba.D",),
    "self_attn.out_proj.weight": ("mamba.out_proj.weight",),
}
MAMBA2: dict[str, tuple[str, ...]] = {
    "self_attn.in_proj.weight": ("mamba.in_proj.weight",),
    "self_attn.conv1d.weight": ("mamba.conv1d.weight",),
    "self_attn.dt_bias": ("mamba.dt_bias",),
    "self_attn.A_log": ("mamba.A_log",),
    "self_attn.D": ("mamba.D",),
    "self_attn.out_proj.weight": ("mamba.out_proj.weight",),
}


def describe(folder: Path, shapes: Shapes) -> Published:
    """What the checkpoint is, as ours. `shapes`: names and shapes of its tensors. Raises ValueError for what a mixer of ours cannot be."""
    base, own = load_config(folder), read_object(folder / CONFIG)
    return published(base, own, shapes)


def published(base: PreTrainedConfig, own: dict[str, Any], shapes: Shapes) -> Published:
    """The checkpoint with the transformer's configuration `base` and the values `own` of its `mamba_config.json`."""
    _check_base(base, own)
    kept = [int(i) for i in own["attn_layers"]]
    recurrent = [i for i in range(base.num_hidden_layers) if i not in kept]
    if not recurrent:
        raise ValueError(f"{CONFIG}: attn_layers keeps every layer; this is an ordinary {base.model_type}, nothing is to be imported")
    ssm, first = dict(own.get("ssm_cfg") or {}), f"model.layers.{recurrent[0]}.mamba."
    second = "ngroups" in ssm or f"{first}dt_bias" in shapes
    inner = own.get("d_inner") or int(ssm.get("expand", 2) * own["d_model"])
    head = family_of(base).shape(base)["head_dim"]
    kind, options, quirks = (_mamba2 if second else _mamba1)(own, ssm, inner, head)
    biased = {name for name in ("in_proj", "in_proj_x", "in_proj_z", "out_proj") if f"{first}{name}.bias" in shapes}
    options |= {"proj_bias": bool(biased - {"out_proj"}), "out_bias": "out_proj" in biased, "conv_width": ssm.get("d_conv", 4)}
    fused = [i for i in kept if f"model.layers.{i}.mha.in_proj.weight" in shapes]
    if fused:
        quirks.append("kept attention comes from fused weights (mha), which rotate without the base model's scaling of RoPE")
        base.rope_parameters = {"rope_type": "default", "rope_theta": base.rope_parameters["rope_theta"]}
    base.tie_word_embeddings = bool(base.tie_word_embeddings) and "lm_head.weight" not in shapes
    config = student_config(base, kind, kept, options)
    table = {name: same(name) for name in MODEL if name != "lm_head.weight" or not config.tie_word_embeddings}
    for i in range(base.num_hidden_layers):
        layer = _attention(config, i, shapes) if i in kept else _mixer(kind, config, i, shapes)
        table |= layer | {f"model.layers.{i}.{name}": same(f"model.layers.{i}.{name}") for name in AROUND}
    name = f"MambaInLlama, {'Mamba-2' if second else 'Mamba-1'}"
    return Published(name, config, table, quirks)


def _check_base(base: PreTrainedConfig, own: dict[str, Any]) -> None:
    if base.model_type not in ("llama", "mistral", "qwen2"):
        raise ValueError(f"config.json beside {CONFIG} must be of a llama, mistral or qwen2; got model_type {base.model_type!r}")
    lost = [name for name in ("d_model", "d_xb", "n_layer", "attn_layers") if own.get(name) is None]
    if lost:
        raise ValueError(f"{CONFIG} must say {lost[0]}; it has {', '.join(sorted(own))}")
    pairs = {
        "d_model": "hidden_size", "n_layer": "num_hidden_layers", "intermediate_size": "intermediate_size", "hidden_act": "hidden_act",
        "rms_norm_eps": "rms_norm_eps",
    }  # fmt: skip
    for mine, theirs in pairs.items():
        if own.get(mine) is not None and own[mine] != getattr(base, theirs):
            raise ValueError(f"{CONFIG} and config.json must agree; {mine} is {own[mine]} and {theirs} is {getattr(base, theirs)}")


def _check_free(ssm: dict[str, Any], neutral: Mapping[str, Any]) -> None:
    """Raises ValueError for an option of their layer that changes what it computes and that ours has not."""
    for name, values in neutral.items():
        if name in ssm and ssm[name] not in values:
            raise ValueError(f"{CONFIG}: ssm_cfg.{name} must be one of {list(values)}; got {ssm[name]!r}, which no mixer here computes")


def _mamba1(own: dict[str, Any], ssm: dict[str, Any], inner: int, head: int) -> tuple[str, dict[str, Any], list[str]]:
    width = ssm.get("d_state", 16)
    head = head if own["d_xb"] % head == inner % head == head % width == 0 else width
    rank = ssm.get("dt_rank", "auto")
    repeated = ssm.get("repeat_kv_before_conv", True)
    quirks = ["the step's bias is added twice", f"keys and values are repeated in blocks of {width} coordinates, not in heads"]
    quirks += ["the convolution stands behind the repeat"] if repeated and inner != own["d_xb"] else []
    return "mamba1", {
        "heads": inner // head, "groups": own["d_xb"] // head, "head_dim": head, "state": width, "double_dt_bias": True, "block_gqa": True,
        "conv_after_repeat": repeated, "dt_rank": math.ceil(own["d_model"] / 16) if rank == "auto" else rank,
    }, quirks  # fmt: skip


def _mamba2(own: dict[str, Any], ssm: dict[str, Any], inner: int, head: int) -> tuple[str, dict[str, Any], list[str]]:
    width, groups = ssm.get("d_state", 128), ssm.get("ngroups", 1)
    if inner != groups * width or own["d_xb"] % width:
        raise ValueError(
            f"{CONFIG}: d_inner must be ngroups x d_state and d_xb a multiple of d_state; got d_inner {inner}, ngroups {groups}, d_state "
            f"{width}, d_xb {own['d_xb']}"
        )
    _check_free(ssm, {"norm_before_gate": (False,), "D_has_hdim": (False,), "d_ssm": (None, inner)})
    if tuple(ssm.get("dt_limit", (0.0, math.inf))) != (0.0, math.inf):
        raise ValueError(f"{CONFIG}: ssm_cfg.dt_limit must be left out; got {ssm['dt_limit']}, and no mixer here clamps steps")
    repeated, normed = ssm.get("repeat_kv_before_conv", False), ssm.get("rmsnorm", True)
    quirks = ["the convolution stands behind the repeat of keys and values"] if repeated and groups * width != own["d_xb"] else []
    quirks += [f"the norm behind the gate has epsilon {NORM_EPS}, whatever the model's"] if normed else []
    return "mamba2", {
        "heads": groups, "groups": own["d_xb"] // width, "head_dim": width, "state": width, "conv_after_repeat": repeated,
        "out_norm": normed, "norm_eps": NORM_EPS, "qk_norm": None,
    }, quirks  # fmt: skip


def _mixer(kind: str, config: PreTrainedConfig, i: int, shapes: Shapes) -> dict[str, Take]:
    ours, c = f"model.layers.{i}.", config.to_dict()["mixer"]
    fused = f"{ours}mamba.in_proj.weight" in shapes
    names = MAMBA2 if kind == "mamba2" else MAMBA1 | (MAMBA1_FUSED if fused else MAMBA1_TRAINING)
    table = {ours + own: stacked(*(ours + name for name in theirs)) for own, theirs in names.items()}
    conv = f"{ours}mamba.conv1d."
    table[f"{ours}self_attn.conv1d.bias"] = same(f"{conv}bias") if f"{conv}bias" in shapes else Take((f"{conv}weight",), _zeros_beside)
    if c["out_norm"]:
        table[f"{ours}self_attn.norm.weight"] = same(f"{ours}mamba.norm.weight")
    if c["out_bias"]:
        table[f"{ours}self_attn.out_proj.bias"] = same(f"{ours}mamba.out_proj.bias")
    if c["proj_bias"]:
        parts = ("in_proj",) if fused else ("in_proj_z", "in_proj_x")
        names_of = tuple(
            f"{ours}mamba.{part}.{what}" for part in parts for what in ("weight", "bias") if f"{ours}mamba.{part}.{what}" in shapes
        )
        rest = () if fused else tuple(f"{ours}mamba.{part}.weight" for part in ("B_proj", "C_proj", "dt_proj_down"))
        table[f"{ours}self_attn.in_proj.bias"] = Take(
            names_of + rest, partial(_biases, [name.endswith("bias") for name in names_of + rest])
        )
    return table


def _zeros_beside(weight: Tensor) -> Tensor:
    return weight.new_zeros(len(weight))


def _biases(is_bias: list[bool], *tensors: Tensor) -> Tensor:
    """The stacked biases of stacked projections: what has none has zeros. A bias stands behind its weight."""
    parts: list[Tensor] = []
    for place, tensor in enumerate(tensors):
        if is_bias[place]:
            parts[-1] = tensor
        else:
            parts.append(tensor.new_zeros(len(tensor)))
    return torch.cat(parts)


def _attention(config: PreTrainedConfig, i: int, shapes: Shapes) -> dict[str, Take]:
    """Kept attention: Hugging Face's four projections, or the fused ones that their inference code makes of them."""
    ours, (qkv_bias, o_bias) = f"model.layers.{i}.", family_of(config).biases(config)
    fused = f"{ours}mha.in_proj.weight" in shapes
    table: dict[str, Take] = {}
    head = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    rows = [count * head for count in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)]
    for what in ("weight", *(["bias"] if qkv_bias else [])):
        for place, name in enumerate("qkv"):
            own = f"{ours}self_attn.{name}_proj.{what}"
            table[own] = Take((f"{ours}mha.in_proj.{what}",), partial(_part, rows, place)) if fused else same(own)
    for what in ("weight", *(["bias"] if o_bias else [])):
        own = f"{ours}self_attn.o_proj.{what}"
        table[own] = same(f"{ours}mha.out_proj.{what}") if fused else same(own)
    return table


def _part(rows: list[int], place: int, tensor: Tensor) -> Tensor:
    return tensor.split(rows)[place]
