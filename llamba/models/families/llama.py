"""Llama: one configuration value says whether its projections have biases."""

from dataclasses import field
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

from llamba.models.families.base import Family, attention_biases
from llamba.models.hybrid import HybridBackbone, HybridCausalLM, HybridSequenceClassifier


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


class LlamaHybridForSequenceClassification(HybridSequenceClassifier, LlamaPreTrainedModel):
    config: LlamaHybridConfig


FAMILY = Family(
    LlamaHybridConfig, LlamaHybridModel, LlamaHybridForCausalLM, LlamaHybridForSequenceClassification,
    biases=attention_biases,
)  # fmt: skip
