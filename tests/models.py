"""Small random teachers of every family, and the students made of them."""

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

from llamba.models.convert import convert

VOCABULARY = 101
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA31_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
TEACHERS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "llama-3.2": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, "rope_parameters": LLAMA31_ROPE, "head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 16}),
    "phi": (PhiConfig, PhiForCausalLM, {}),
    "phi-qk-norm": (PhiConfig, PhiForCausalLM, {"qk_layernorm": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}
MIXERS = ("mamba1", "mamba2", "discrete_mamba2")
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {  # mixers with options, as students of theirs are called here
    "mamba2-window": ("mamba2", {"window": 6, "sinks": 2, "rotary": True}),
    "gated_delta-window": ("gated_delta", {"window": 5, "sinks": 1, "rotary": True}),
    "discrete_mamba2-window": ("discrete_mamba2", {"window": 3}),
}
STUDENTS = (*MIXERS, "mamba2-window")
DELTA_RULES = ("gated_delta", "kda")
LATER = (*DELTA_RULES, "mamba3")  # mixers whose widest tests are slow
EVERY_STUDENT = (*STUDENTS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (*LATER, "gated_delta-window")))


def teacher(name: str = "llama", groups: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A random teacher whose biases and norms are random too, so that a forgotten one shows."""
    torch.manual_seed(seed)
    config, model, more = TEACHERS[name]
    made = model(config(**SHAPE, num_key_value_heads=groups, **more)).to(dtype).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(4)
        embedding: Any = made.get_input_embeddings()
        embedding.weight[SHAPE["pad_token_id"]].normal_(std=0.08)  # zeros would end every greedy text of a model without attention
    return made


def student(mixer: str = "mamba2", name: str = "llama", attention: Any = 0.5, dtype: torch.dtype = torch.float64, **more: Any):
    """A converted model with random new parameters (`init="paper"`), so that every one of them matters."""
    kind, options = OPTIONS.get(mixer, (mixer, {}))
    options = options | more.pop("options", {})
    made = convert(teacher(name, dtype=dtype), mixer=kind, attention=attention, options=options, **{"init": "paper", **more})
    for layer in made.model.layers if options else ():
        open_join(layer.self_attn)
    return made


def open_join(mixer: torch.nn.Module) -> None:
    """Let the rest beside a window count, as it does once it is trained."""
    ranges = {"norm.weight": (0.5, 1.5), "join": (0.5, 1.5), "rest_bias": (0.0, 2.0), "rest_growth": (0.5, 1.5), "rest_mean": (0.5, 1.5)}
    for name, weight in mixer.named_parameters():
        if name in ranges:
            torch.nn.init.uniform_(weight, *ranges[name], generator=torch.Generator().manual_seed(weight.numel()))
    if getattr(mixer, "sight", None) is not None:
        rows = mixer.in_proj.weight.data[-mixer.config.heads :]
        rows.normal_(std=0.3, generator=torch.Generator().manual_seed(rows.numel()))


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def rms_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """RMS(got - want) / RMS(want)."""
    return ((got - want).double().square().mean().sqrt() / want.double().square().mean().sqrt()).item()
