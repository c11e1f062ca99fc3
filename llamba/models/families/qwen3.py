"""Qwen3: an RMS norm on every head of q and k."""

from dataclasses import field
from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model, Qwen3PreTrainedModel

from llamba.models.families.base import Family, attention_biases
from llamba.models.hybrid import HybridBackbone, HybridCausalLM, HybridSequenceClassifier


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


class Qwen3HybridForSequenceClassification(HybridSequenceClassifier, Qwen3PreTrainedModel):
    config: Qwen3HybridConfig


FAMILY = Family(
    Qwen3HybridConfig, Qwen3HybridModel, Qwen3HybridForCausalLM, Qwen3HybridForSequenceClassification,
    biases=attention_biases, norm_kind=lambda config: "rms",
    norms={"q_norm": "q_norm", "k_norm": "k_norm"},
)  # fmt: skip
