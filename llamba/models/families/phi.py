"""Phi-1.5: biases everywhere, layer norms, a bias on the head."""

from dataclasses import field
from typing import Any

from transformers import PhiConfig, PhiForCausalLM, PhiModel, PhiPreTrainedModel

from llamba.models.families.base import Family
from llamba.models.hybrid import HybridBackbone, HybridCausalLM, HybridSequenceClassifier, Parts


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


class PhiHybridForSequenceClassification(HybridSequenceClassifier, PhiPreTrainedModel):
    config: PhiHybridConfig


FAMILY = Family(
    PhiHybridConfig, PhiHybridModel, PhiHybridForCausalLM, PhiHybridForSequenceClassification,
    biases=lambda config: (True, True), out="dense",
    norm_kind=lambda config: "layer" if config.qk_layernorm else None, norm_eps="layer_norm_eps",
    norms={"q_layernorm": "q_norm", "k_layernorm": "k_norm"},
)  # fmt: skip
