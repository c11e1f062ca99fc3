"""The families of teachers: three thin classes and one entry each.

Adding a family: subclass its configuration, base model and causal LM below, and add one entry to FAMILIES.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PhiConfig,
    PhiForCausalLM,
    PhiModel,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)  # fmt: skip

from llamba.models.hybrid import HybridBackbone, HybridCausalLM, Parts
from llamba.models.mixers import AttentionWeights
from llamba.models.offloaded import present


class LlamaHybridConfig(LlamaConfig):
    """Llama with `layer_types` and one mixer configuration."""

    model_type = "llamba_llama"
    layer_types: list[str] | None = None
    mixer: dict[str, Any] = field(default_factory=dict)
    head_tokens: int | None = None  # a draft's pruned head; None: all of the vocabulary
    auto_map: dict[str, str] | None = field(default_factory=dict)


class LlamaHybridModel(HybridBackbone, LlamaModel):
    config: LlamaHybridConfig


class LlamaHybridForCausalLM(HybridCausalLM, LlamaForCausalLM):
    config: LlamaHybridConfig
    backbone = LlamaHybridModel


class MistralHybridConfig(MistralConfig):
    """Mistral with `layer_types` and one mixer configuration; kept attention keeps its sliding window."""

    model_type = "llamba_mistral"
    layer_types: list[str] | None = None
    mixer: dict[str, Any] = field(default_factory=dict)
    head_tokens: int | None = None  # a draft's pruned head; None: all of the vocabulary
    auto_map: dict[str, str] | None = field(default_factory=dict)


class MistralHybridModel(HybridBackbone, MistralModel):
    config: MistralHybridConfig


class MistralHybridForCausalLM(HybridCausalLM, MistralForCausalLM):
    config: MistralHybridConfig
    backbone = MistralHybridModel


class PhiHybridConfig(PhiConfig):
    """Phi-1.5 with `layer_types` and one mixer configuration."""

    model_type = "llamba_phi"
    layer_types: list[str] | None = None
    mixer: dict[str, Any] = field(default_factory=dict)
    head_tokens: int | None = None  # a draft's pruned head; None: all of the vocabulary
    auto_map: dict[str, str] | None = field(default_factory=dict)


class PhiHybridModel(HybridBackbone, PhiModel):
    config: PhiHybridConfig
    parts = Parts(final_norm="final_layernorm", embed_dropout="embed_dropout", head_bias=True)


class PhiHybridForCausalLM(HybridCausalLM, PhiForCausalLM):
    config: PhiHybridConfig
    backbone = PhiHybridModel


class Qwen2HybridConfig(Qwen2Config):
    """Qwen2 with one mixer configuration (it has `layer_types` of its own)."""

    model_type = "llamba_qwen2"
    mixer: dict[str, Any] = field(default_factory=dict)
    head_tokens: int | None = None  # a draft's pruned head; None: all of the vocabulary
    auto_map: dict[str, str] | None = field(default_factory=dict)


class Qwen2HybridModel(HybridBackbone, Qwen2Model):
    config: Qwen2HybridConfig


class Qwen2HybridForCausalLM(HybridCausalLM, Qwen2ForCausalLM):
    config: Qwen2HybridConfig
    backbone = Qwen2HybridModel


class Qwen3HybridConfig(Qwen3Config):
    """Qwen3 with one mixer configuration (it has `layer_types` of its own)."""

    model_type = "llamba_qwen3"
    mixer: dict[str, Any] = field(default_factory=dict)
    head_tokens: int | None = None  # a draft's pruned head; None: all of the vocabulary
    auto_map: dict[str, str] | None = field(default_factory=dict)


class Qwen3HybridModel(HybridBackbone, Qwen3Model):
    config: Qwen3HybridConfig


class Qwen3HybridForCausalLM(HybridCausalLM, Qwen3ForCausalLM):
    config: Qwen3HybridConfig
    backbone = Qwen3HybridModel


@dataclass(frozen=True)
class Family:
    """What conversion needs to know of a family.

    `out` names the output projection; `norms` maps a query/key norm's name in the teacher to ours; `norm_kind` says which norm it is;
    `biases(config)` says whether (q, k, v) and o have biases.
    """

    config: type[PreTrainedConfig]
    model: type[HybridBackbone]
    causal_lm: type[HybridCausalLM]
    biases: Callable[[PreTrainedConfig], tuple[bool, bool]]
    norm_kind: Callable[[PreTrainedConfig], str | None] = lambda config: None
    norm_eps: str = "rms_norm_eps"
    norms: dict[str, str] = field(default_factory=dict)
    out: str = "o_proj"

    def shape(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The attention's shape as arguments of `llamba.models.mixers.mixer_config`."""
        eps, values = getattr(config, self.norm_eps), config.to_dict()
        sliding = values.get("sliding_window")
        kinds = values.get("layer_types") or ["sliding_attention"] * config.num_hidden_layers
        return {
            "hidden_size": config.hidden_size,
            "heads": config.num_attention_heads,
            "groups": config.num_key_value_heads,
            "head_dim": values.get("head_dim") or config.hidden_size // config.num_attention_heads,
            "out_bias": self.biases(config)[1],
            "qk_norm": self.norm_kind(config),
            "qk_norm_eps": eps,
            "norm_eps": eps,
            "sliding_window": sliding,
            "sliding_layers": None if sliding is None else [index for index, kind in enumerate(kinds) if kind == "sliding_attention"],
        }

    def read(self, attention: nn.Module) -> AttentionWeights:
        """The weights of one attention module of this family; offloaded ones on the CPU. Raises ValueError for weights without values."""
        with present(attention):
            return self._read(attention)

    def _read(self, attention: nn.Module) -> AttentionWeights:
        projections: list[Any] = [attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj", self.out)]
        norms: dict[str, torch.Tensor] = {}
        for theirs, ours in self.norms.items():
            if theirs in dict(attention.named_children()):
                norms |= {f"{ours}.{name}": value.detach() for name, value in attention.get_submodule(theirs).named_parameters()}
        weights = {name: module.weight.detach() for name, module in zip("qkvo", projections, strict=True)}
        biases = {f"{name}_bias": module.bias.detach() for name, module in zip("qkvo", projections, strict=True) if module.bias is not None}
        return AttentionWeights(**weights, **biases, norms=norms)


def _llama_biases(config: PreTrainedConfig) -> tuple[bool, bool]:
    return config.attention_bias, config.attention_bias


FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaHybridConfig, LlamaHybridModel, LlamaHybridForCausalLM, biases=_llama_biases),
    "mistral": Family(MistralHybridConfig, MistralHybridModel, MistralHybridForCausalLM, biases=lambda config: (False, False)),
    "phi": Family(
        PhiHybridConfig, PhiHybridModel, PhiHybridForCausalLM, biases=lambda config: (True, True), out="dense",
        norm_kind=lambda config: "layer" if config.qk_layernorm else None, norm_eps="layer_norm_eps",
        norms={"q_layernorm": "q_norm", "k_layernorm": "k_norm"},
    ),
    "qwen2": Family(Qwen2HybridConfig, Qwen2HybridModel, Qwen2HybridForCausalLM, biases=lambda config: (True, False)),
    "qwen3": Family(
        Qwen3HybridConfig, Qwen3HybridModel, Qwen3HybridForCausalLM, biases=_llama_biases,
        norm_kind=lambda config: "rms", norms={"q_norm": "q_norm", "k_norm": "k_norm"},
    ),
}  # fmt: skip


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a teacher's or a student's configuration. Raises ValueError for one that is not supported."""
    name = config.model_type.removeprefix("llamba_")
    if name not in FAMILIES:
        raise ValueError(f"teacher: its model_type must be one of {', '.join(FAMILIES)}; got {config.model_type!r}")
    return FAMILIES[name]


def register() -> None:
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know the hybrids. Done once, on `import llamba`."""
    for family in FAMILIES.values():
        AutoConfig.register(family.config.model_type, family.config)
        AutoModel.register(family.config, family.model)
        AutoModelForCausalLM.register(family.config, family.causal_lm)


register()
