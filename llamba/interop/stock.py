"""Mamba-2 hybrids as architectures that transformers and the serving engines have: GraniteMoeHybrid and Bamba.

Both hold, in each layer, attention or a Mamba-2 mixer with its own number of groups; with one group per head they are exactly our
"mamba2" mixer, its norm over each head included (transformers from 5.23.0). Only names change, and x and B are repeated for every head.

Shapes: D model width, H query heads, G key/value heads, P head width = state width, W convolution width.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from llamba.base.folders import resolve_model
from llamba.interop.folders import Weights, check_names, copy_tokenizer, save_weights, whole_folder
from llamba.interop.students import expected_tensors
from llamba.models.families import family_of
from llamba.models.hybrid import RECURRENT
from llamba.models.loading import load_config, load_generation_config
from llamba.models.mixers import MixerConfig

NEEDS_TRANSFORMERS = "5.23.0"  # the first whose gated norm knows groups
CHUNK = 256  # how many tokens stock code scans at a time; no part of the model


def _as_it_is(tensor: Tensor, c: MixerConfig) -> Tensor:
    return tensor


def _per_head(tensor: Tensor, c: MixerConfig) -> Tensor:  # [G P, ...] -> [H P, ...]
    return tensor.unflatten(0, (c.groups, c.head_dim)).repeat_interleave(c.heads // c.groups, 0).flatten(0, 1)


def _projection(tensor: Tensor, c: MixerConfig) -> Tensor:
    """Rows z | x | B | C | dt, with x and B repeated for every head."""
    z, x, b, q, dt = tensor.split([c.inner, c.shared, c.shared, c.inner, c.heads])
    return torch.cat((z, _per_head(x, c), _per_head(b, c), q, dt))


def _convolved(tensor: Tensor, c: MixerConfig) -> Tensor:
    """Channels x | B | C, with x and B repeated for every head (they are already where the convolution stands behind the repeat)."""
    if c.conv_after_repeat:
        return tensor
    x, b, q = tensor.split([c.shared, c.shared, c.inner])
    return torch.cat((_per_head(x, c), _per_head(b, c), q))


def _wide(tensor: Tensor, c: MixerConfig) -> Tensor:
    return tensor.float()


# Their names in a layer <- ours, and how the tensor changes.
MIXER: dict[str, tuple[str, Callable[[Tensor, MixerConfig], Tensor]]] = {
    "mamba.in_proj.weight": ("self_attn.in_proj.weight", _projection),
    "mamba.conv1d.weight": ("self_attn.conv1d.weight", _convolved),
    "mamba.conv1d.bias": ("self_attn.conv1d.bias", _convolved),
    "mamba.dt_bias": ("self_attn.dt_bias", _wide),
    "mamba.A_log": ("self_attn.A_log", _wide),
    "mamba.D": ("self_attn.D", _wide),
    "mamba.norm.weight": ("self_attn.norm.weight", _as_it_is),
    "mamba.out_proj.weight": ("self_attn.out_proj.weight", _as_it_is),
}
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")


@dataclass(frozen=True)
class Layout:
    """A stock architecture: its names <- ours outside attention and mixer (several of ours are stacked), and what it has no place for."""

    model_type: str
    architecture: str
    hosts: str
    top: dict[str, str]
    layer: dict[str, tuple[str, ...]]
    mlp_bias: bool = False


GRANITE = Layout(
    "granitemoehybrid", "GraniteMoeHybridForCausalLM", "transformers 5.23 or later, vLLM and SGLang",
    {name: name for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")},
    {
        "input_layernorm.weight": ("input_layernorm.weight",),
        "post_attention_layernorm.weight": ("post_attention_layernorm.weight",),
        "shared_mlp.input_linear.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "shared_mlp.output_linear.weight": ("mlp.down_proj.weight",),
    },
)  # fmt: skip
BAMBA = Layout(
    "bamba", "BambaForCausalLM", "transformers 5.23 or later and llama.cpp's converter",
    {
        "model.embed_tokens.weight": "model.embed_tokens.weight", "model.final_layernorm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    },
    {
        "input_layernorm.weight": ("input_layernorm.weight",),
        "pre_ff_layernorm.weight": ("post_attention_layernorm.weight",),
        **{f"feed_forward.{name}_proj.weight": (f"mlp.{name}_proj.weight",) for name in ("gate", "up", "down")},
    },
    mlp_bias=True,
)  # fmt: skip
LAYOUTS = {"granite": GRANITE, "bamba": BAMBA}
FAMILIES_THAT_FIT = ("llama", "mistral", "qwen2")
# What the stock mixers can hold of ours; every other field of MixerConfig must have its default.
FREE_FIELDS = (
    "kind", "hidden_size", "heads", "groups", "head_dim", "state", "conv_width", "norm_eps", "proj_bias", "out_bias", "conv_after_repeat",
    "qk_norm_eps", "dt_rank",
)  # fmt: skip
SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "tie_word_embeddings", "attention_dropout",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
NEEDED = {"out_norm": True, "conv_activation": "silu"}


# Why no stock architecture (transformers 5.23) is exactly the model with this mixer, and which comes nearest.
NEAREST = {
    "mamba1": "Jamba's Mamba-1 normalises step, B and C, and shares B and C between all channels",
    "discrete_mamba2": "every stock mixer scales what it writes by its step",
    "gated_delta": "the delta rule of Qwen3-Next and OLMo-hybrid writes and erases by one gate; this one writes by its key's length",
    "kda": "Kimi-Linear's delta rule writes and erases by one gate, beside latent attention; this one writes by its key's length",
    "mamba3": "nothing in transformers 5.23 is Mamba-3",
    "window": "no stock mixer attends beside its recurrence but Falcon-H1's, whose attention sees everything",
    "sinks": "no stock mixer attends beside its recurrence but Falcon-H1's, whose attention sees everything",
    "rotary": "no stock Mamba-2 turns B and C by position",
}


def _mixer_obstacle(c: MixerConfig) -> str | None:
    if c.kind != "mamba2":
        why = f" ({NEAREST[c.kind]})" if c.kind in NEAREST else ""
        return f'the stock mixer is Mamba-2 and this student\'s is mixer="{c.kind}"{why}'
    if c.state != c.head_dim:
        return f"the output norm is per head and the state must be as wide as a head; got state {c.state} and head_dim {c.head_dim}"
    for spec in fields(MixerConfig):
        value = getattr(c, spec.name)
        default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
        if spec.name in FREE_FIELDS or value == NEEDED.get(spec.name, default):
            continue
        if spec.name == "qk_norm":
            return f'norms of queries and keys (mixer.qk_norm="{value}", as of Qwen3) have no place there'
        if spec.name in NEEDED:
            return f"the stock mixer has mixer.{spec.name}={NEEDED[spec.name]!r}; got {value!r}"
        why = f" ({NEAREST[spec.name]})" if spec.name in NEAREST else ""
        return f"mixer.{spec.name}={value!r} has no place there{why}"
    return None


def obstacle(config: PreTrainedConfig, layout: Layout = GRANITE) -> str | None:
    """Why a student cannot be written in a stock layout, None where it can. Needs no weights."""
    family = config.model_type.removeprefix("llamba_")
    values = config.to_dict()
    if family not in FAMILIES_THAT_FIT or not values.get("mixer"):
        return f"the stock model is of the Llama kind with mixers; model_type {config.model_type!r} is not (phi has LayerNorm, qwen3 norms)"
    c = MixerConfig(**values["mixer"])
    rotary = values.get("rope_parameters") or {}
    hidden, width = config.hidden_size, c.inner
    checks = [
        (_mixer_obstacle(c) or "", _mixer_obstacle(c) is not None),
        (f"a sliding window ({values.get('sliding_window')}) has no place there", "sliding_attention" in (values.get("layer_types") or [])),
        (f"heads x head_dim must be a multiple of the width {hidden}; got {c.heads} x {c.head_dim} = {width}", width % hidden != 0),
        (f"one epsilon serves all norms; got {c.norm_eps} in the mixer and {values.get('rms_norm_eps')} elsewhere",
         c.norm_eps != values.get("rms_norm_eps")),
        (f"a pruned head (of {values.get('head_tokens')} tokens) has no place there", values.get("head_tokens") is not None),
        ("biases in the MLP have no place there", bool(values.get("mlp_bias")) and not layout.mlp_bias),
        (f"rotation of a part of each head ({rotary.get('partial_rotary_factor')}) has no place there",
         rotary.get("partial_rotary_factor", 1.0) != 1.0),
    ]  # fmt: skip
    return next((reason for reason, stands in checks if stands), None)


def stock_config(config: PreTrainedConfig, layout: Layout, proj_bias: bool) -> dict[str, Any]:
    """The stock architecture's config.json. Raises ValueError, naming the reason, for a student that it cannot hold."""
    reason = obstacle(config, layout)
    if reason is not None:
        raise ValueError(f"{layout.architecture} cannot hold this student: {reason}")
    values, c = config.to_dict(), MixerConfig(**config.to_dict()["mixer"])
    kinds = ["mamba" if kind == RECURRENT else "attention" for kind in values["layer_types"]]
    made = {name: values[name] for name in SHARED_FIELDS} | {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        "dtype": str(config.dtype or torch.float32).split(".")[-1],
        "transformers_version": NEEDS_TRANSFORMERS,
        "use_cache": "attention" in kinds,
        "attention_bias": any(family_of(config).biases(config)),
        "head_dim": c.head_dim,
        "mamba_n_heads": c.heads,
        "mamba_n_groups": c.heads,
        "mamba_d_head": c.head_dim,
        "mamba_d_state": c.head_dim,
        "mamba_d_conv": c.conv_width,
        "mamba_expand": c.inner // c.hidden_size,
        "mamba_chunk_size": CHUNK,
        "mamba_conv_bias": True,
        "mamba_proj_bias": proj_bias,
    }
    rotary = values["rope_parameters"]
    if layout is BAMBA:  # without the factor half of every head would stay unrotated
        more = {"rope_parameters": rotary | {"partial_rotary_factor": 1.0}, "mlp_bias": bool(values.get("mlp_bias"))}
        return made | more | {"attn_layer_indices": [i for i, kind in enumerate(kinds) if kind == "attention"]}
    if c.head_dim == config.hidden_size // config.num_attention_heads:
        del made["head_dim"]
    ones = {name: 1.0 for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling")}
    experts = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": config.intermediate_size}
    return made | ones | experts | {
        "layer_types": kinds, "position_embedding_type": "rope", "rope_parameters": rotary, "attention_multiplier": c.head_dim**-0.5,
    }  # fmt: skip


class Source:
    """A student's folder: configuration, weights, and what of its projections' biases is really there."""

    def __init__(self, folder: str | Path):
        self.folder = Path(resolve_model(folder))
        self.config: PreTrainedConfig = load_config(self.folder)
        family_of(self.config)
        if not self.config.to_dict().get("mixer"):
            raise ValueError(f"a converted model is needed; {folder} is an ordinary {self.config.model_type}, which engines load as it is")
        self.weights = Weights(self.folder)
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        found = {name: self.weights.shape(name) for name in self.weights if name not in tied}
        check_names(str(folder), expected_tensors(self.config), found)
        self.mixer = MixerConfig(**self.config.to_dict()["mixer"])
        self.recurrent = [i for i, kind in enumerate(self.config.layer_types) if kind == RECURRENT]

    def proj_bias(self) -> bool:
        """Whether a projection of a mixer has a bias that is not zero; that of the step does not count, it goes into dt_bias."""
        for i in self.recurrent:
            for name in ("in_proj", "out_proj"):
                key = f"model.layers.{i}.self_attn.{name}.bias"
                if key in self.weights and bool(self.weights[key][: -self.mixer.heads if name == "in_proj" else None].any()):
                    return True
        return False


def stock_tensors(source: Source, layout: Layout, proj_bias: bool) -> Iterator[tuple[str, Tensor]]:
    """The stock architecture's tensors, one after the other."""
    weights, config = source.weights, source.config
    for theirs, ours in layout.top.items():
        if ours != "lm_head.weight" or not config.tie_word_embeddings:
            yield theirs, weights[ours]
    biased = any(family_of(config).biases(config))
    for i in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{i}.", f"model.layers.{i}."
        for name, parts in layout.layer.items():
            yield theirs + name, torch.cat([weights[ours + part] for part in parts]) if len(parts) > 1 else weights[ours + parts[0]]
            if layout.mlp_bias and config.to_dict().get("mlp_bias") and "feed_forward" in name:
                yield theirs + name.replace("weight", "bias"), weights[ours + parts[0].replace("weight", "bias")]
        if i in source.recurrent:
            yield from ((theirs + name, tensor) for name, tensor in _mixer_tensors(source, ours, proj_bias))
            continue
        for name in ATTENTION:
            weight = weights[f"{ours}{name}.weight"]
            yield f"{theirs}{name}.weight", weight
            if biased:  # one flag for all four: what has no bias gets zeros
                key = f"{ours}{name}.bias"
                yield f"{theirs}{name}.bias", weights[key] if key in weights else weight.new_zeros(len(weight))


def _mixer_tensors(source: Source, ours: str, proj_bias: bool) -> Iterator[tuple[str, Tensor]]:
    weights, c = source.weights, source.mixer
    bias = weights[f"{ours}self_attn.in_proj.bias"] if c.proj_bias else None
    for name, (own, change) in MIXER.items():
        tensor = change(weights[ours + own], c)
        if name == "mamba.dt_bias" and bias is not None and not proj_bias:
            tensor = tensor + bias[-c.heads :].float()
        yield name, tensor
    if not proj_bias:
        return
    weight = weights[f"{ours}self_attn.in_proj.weight"]
    yield "mamba.in_proj.bias", _projection(weight.new_zeros(len(weight)) if bias is None else bias, c)
    out = f"{ours}self_attn.out_proj.bias"
    yield "mamba.out_proj.bias", weights[out] if out in weights else weight.new_zeros(c.hidden_size)


@dataclass
class Exported:
    """What an export wrote, and what its reader must know."""

    out: Path
    architecture: str
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line for the folder, one for each note."""
        return "\n".join([f"saved: {self.out} ({self.architecture})", *(f"note: {note}" for note in self.notes)])


def _notes(source: Source, layout: Layout, proj_bias: bool, tokenizer: bool) -> list[str]:
    c, notes = source.mixer, [
        f"load it with transformers {NEEDS_TRANSFORMERS} or later: older ones normalise over all heads together, without a word, and "
        "every logit is wrong; so does mlx-lm (0.32.2)",
    ]  # fmt: skip
    if layout is BAMBA:
        notes.append("vLLM has no Bamba after 0.23 and SGLang has none: export without --format for those")
    elif c.inner != c.hidden_size:
        notes.append(f"vLLM and SGLang take {c.hidden_size // c.heads} for the head width, not {c.head_dim}: they cannot run this folder")
    if proj_bias:
        notes.append(
            "the mixers' projections have biases: transformers' own code is wrong for left-padded batches of this model (the bias enters "
            'the convolution), and llama.cpp has no place for them; convert with options={"proj_bias": False} for a model without'
        )
    if len(source.recurrent) == source.config.num_hidden_layers:
        notes.append("no layer has attention: transformers runs it with use_cache=False alone (which the folder says), and vLLM not at all")
    if not tokenizer:
        notes.append("no tokenizer files were found; the folder holds none")
    return notes


def write_stock(source: Source, out: Path, layout: Layout, config: dict[str, Any], tensors: Iterator[tuple[str, Tensor]]) -> bool:
    """Write configuration, weights and tokenizer into a folder; whether there was a tokenizer."""
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_weights(out, tensors)
    generation = load_generation_config(source.folder)
    if generation is not None:
        if not config["use_cache"]:
            generation.use_cache = False
        generation.save_pretrained(out)
    return copy_tokenizer(source.folder, out)


def export_stock(folder: str | Path, out: str | Path, layout: Layout = GRANITE) -> Exported:
    """Write a Mamba-2 hybrid as a stock architecture, which loads without llamba.

    Raises ValueError for a student that the architecture cannot hold (with the reason), for weights that are not those of the
    configuration, and where `out` has files; then nothing is written.
    """
    source = Source(folder)
    reason = obstacle(source.config, layout)
    if reason is not None:
        raise ValueError(f'{layout.architecture} cannot hold this student: {reason}; one with mixer="mamba2" and no options can go')
    proj_bias = source.proj_bias()
    with whole_folder(out) as made:
        tokenizer = write_stock(
            source, made, layout, stock_config(source.config, layout, proj_bias), stock_tensors(source, layout, proj_bias)
        )
    return Exported(Path(out), layout.architecture, _notes(source, layout, proj_bias, tokenizer))
