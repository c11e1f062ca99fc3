"""What conversion needs to know of a family of teachers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from llamba.models.hybrid import HybridBackbone, HybridCausalLM, HybridSequenceClassifier
from llamba.models.mixers import AttentionWeights
from llamba.models.offloaded import present


@dataclass(frozen=True)
class Family:
    """What conversion needs to know of a family.

    `out` names the output projection; `norms` maps a query/key norm's name in the teacher to ours; `norm_kind` says which norm it is;
    `biases(config)` says whether (q, k, v) and o have biases.
    """

    config: type[PreTrainedConfig]
    model: type[HybridBackbone]
    causal_lm: type[HybridCausalLM]
    classifier: type[HybridSequenceClassifier]
    biases: Callable[[PreTrainedConfig], tuple[bool, bool]]
    norm_kind: Callable[[PreTrainedConfig], str | None] = lambda config: None
    norm_eps: str = "rms_norm_eps"
    norms: dict[str, str] = field(default_factory=dict)
    out: str = "o_proj"

    def shape(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The attention's shape as arguments of `llamba.models.mixers.mixer_config`."""
        eps, values = getattr(config, self.norm_eps), config.to_dict()
        sliding = values.get("sliding_window")
        head_dim = values.get("head_dim") or config.hidden_size // config.num_attention_heads
        kinds = values.get("layer_types") or ["sliding_attention"] * config.num_hidden_layers
        return {
            "hidden_size": config.hidden_size,
            "heads": config.num_attention_heads,
            "groups": config.num_key_value_heads,
            "head_dim": head_dim,
            "out_bias": self.biases(config)[1],
            "qk_norm": self.norm_kind(config),
            "qk_norm_eps": eps,
            "norm_eps": eps,
            "angles": int(head_dim * values["rope_parameters"].get("partial_rotary_factor", 1.0)) // 2,
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


def attention_biases(config: PreTrainedConfig) -> tuple[bool, bool]:
    """Whether (q, k, v) and o have biases where `attention_bias` says it for all of them."""
    return config.attention_bias, config.attention_bias
