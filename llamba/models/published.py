"""Shapes of published teachers, so that a plan needs neither weights nor network. Names are matched without their organisation."""

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, MistralConfig, PhiConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from llamba.models.loading import load_config

_LLAMA3_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
_LLAMA31_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_LLAMA32_ROPE = {**_LLAMA31_ROPE, "factor": 32.0}

Shape = tuple[type[PreTrainedConfig], dict[str, Any]]


def _shape(
    kind: type[PreTrainedConfig], vocab: int, width: int, mlp: int, layers: int, heads: int, groups: int, context: int, **more: Any
) -> Shape:
    return kind, {
        "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "max_position_embeddings": context, **more,
    }  # fmt: skip


def _llama(width: int, mlp: int, layers: int, heads: int, context: int, rope: dict[str, Any], **more: Any) -> Shape:
    return _shape(LlamaConfig, 128256, width, mlp, layers, heads, 8, context, rms_norm_eps=1e-5, rope_parameters=rope, **more)


KNOWN: dict[str, Shape] = {
    "meta-llama-3-8b": _llama(4096, 14336, 32, 32, 8192, _LLAMA3_ROPE),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 131072, _LLAMA31_ROPE),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 131072, _LLAMA31_ROPE),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 131072, _LLAMA32_ROPE, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 131072, _LLAMA32_ROPE, head_dim=128, tie_word_embeddings=True),
    "mistral-7b-v0.1": _shape(MistralConfig, 32000, 4096, 14336, 32, 32, 8, 32768, sliding_window=4096, rms_norm_eps=1e-5),
    "phi-1_5": _shape(PhiConfig, 51200, 2048, 8192, 24, 32, 32, 2048),
    "qwen2.5-0.5b": _shape(Qwen2Config, 151936, 896, 4864, 24, 14, 2, 32768, tie_word_embeddings=True),
    "qwen2.5-1.5b": _shape(Qwen2Config, 151936, 1536, 8960, 28, 12, 2, 32768, tie_word_embeddings=True),
    "qwen2.5-7b": _shape(Qwen2Config, 152064, 3584, 18944, 28, 28, 4, 32768),
    "smollm2-135m": _shape(
        LlamaConfig,
        49152,
        576,
        1536,
        30,
        9,
        3,
        8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    ),
    "qwen3-0.6b": _shape(Qwen3Config, 151936, 1024, 3072, 28, 16, 8, 40960, head_dim=128, tie_word_embeddings=True),
    "qwen3-1.7b": _shape(Qwen3Config, 151936, 2048, 6144, 28, 16, 8, 40960, head_dim=128, tie_word_embeddings=True),
    "qwen3-4b": _shape(Qwen3Config, 151936, 2560, 9728, 36, 32, 8, 40960, head_dim=128, tie_word_embeddings=True),
    "qwen3-8b": _shape(Qwen3Config, 151936, 4096, 12288, 36, 32, 8, 40960, head_dim=128),
}
ALIASES = {"zephyr-7b-beta": "mistral-7b-v0.1", "zephyr-7b-sft-full": "mistral-7b-v0.1", "meta-llama-3.1-8b": "llama-3.1-8b"}


def teacher_config(name: str) -> PreTrainedConfig:
    """The configuration of a known published teacher, or of the folder or hub name. Raises ValueError where it cannot be had."""
    short = name.rsplit("/", 1)[-1].lower().removesuffix("-instruct")
    short = ALIASES.get(short, short)
    if short in KNOWN and not Path(name).exists():
        kind, values = KNOWN[short]
        return kind(**values)
    try:
        return load_config(name)
    except ValueError as error:
        if Path(name).exists():
            raise
        raise ValueError(
            f"teacher: a folder with config.json, a reachable hub name, or one of the known shapes ({', '.join([*KNOWN, *ALIASES])}) "
            f"is needed; got {name}"
        ) from error
