"""Mistral and Zephyr: no biases; a sliding window."""

from dataclasses import field
from typing import Any

from transformers import MistralConfig, MistralForCausalLM, MistralModel, MistralPreTrainedModel

from llamba.models.families.base import Family
from llamba.models.hybrid import HybridBackbone, HybridCausalLM, HybridSequenceClassifier


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


class MistralHybridForSequenceClassification(HybridSequenceClassifier, MistralPreTrainedModel):
    config: MistralHybridConfig


FAMILY = Family(
    MistralHybridConfig, MistralHybridModel, MistralHybridForCausalLM, MistralHybridForSequenceClassification,
    biases=lambda config: (False, False),
)  # fmt: skip
