"""Qwen2: biases on q, k and v alone."""

from dataclasses import field
from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model, Qwen2PreTrainedModel

from llamba.models.families.base import Family
from llamba.models.hybrid import HybridBackbone, HybridCausalLM, HybridSequenceClassifier


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


class Qwen2HybridForSequenceClassification(HybridSequenceClassifier, Qwen2PreTrainedModel):
    config: Qwen2HybridConfig


FAMILY = Family(
    Qwen2HybridConfig, Qwen2HybridModel, Qwen2HybridForCausalLM, Qwen2HybridForSequenceClassification,
    biases=lambda config: (True, False),
)  # fmt: skip
