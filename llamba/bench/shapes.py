"""Published speculative runs as shapes: a target and a draft with random weights, and what was published for them.

Source: "The Mamba in the Llama" (arXiv 2408.15237), Tables 1 and 5. The targets of Table 1 are pure Mamba stacks; here they are models of
ours without attention, of the same parameter count. One published value cannot be: 4.04 tokens a round from 3 drafted ones.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from llamba.models.convert import student_config
from llamba.models.draft import draft_config
from llamba.models.hybrid import RECURRENT
from llamba.models.published import teacher_config


@dataclass(frozen=True)
class Published:
    """One published row: GPU, tokens drafted, tokens a round, times as fast as plain decoding, tokens per second."""

    gpu: str
    lookahead: int
    tokens_per_round: float
    speedup: float
    tokens_per_second: float | None = None

    @property
    def acceptance(self) -> float:
        """The acceptance rate that the tokens a round imply, by bisection of (1 - a^(K + 1)) / (1 - a)."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            more = sum(middle**place for place in range(self.lookahead + 1)) > self.tokens_per_round
            low, high = (low, middle) if more else (middle, high)
        return low


@dataclass(frozen=True)
class Preset:
    """Shapes of a target and its draft, and the published rows."""

    target: PreTrainedConfig
    draft: PreTrainedConfig
    rows: tuple[Published, ...]


def _stack(width: int, layers: int, heads: int, mlp: int, vocab: int) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip


def _recurrent(teacher: PreTrainedConfig, attention: float = 0.0, mixer: str = "mamba1") -> PreTrainedConfig:
    return student_config(teacher, mixer, attention)


def _hybrid(name: str, attention: float, layers: int, *rows: Published) -> Preset:
    teacher = teacher_config(name)
    return Preset(_recurrent(teacher, attention), draft_config(teacher, layers, None), rows)


def presets() -> dict[str, Preset]:
    """Every preset by name; those of a table share its name as a prefix."""
    mamba_2_8b, mamba_130m = _stack(2560, 32, 20, 6912, 50280), _stack(768, 12, 12, 2048, 50280)
    llama3 = teacher_config("meta-llama-3-8b")
    zephyr, published = "zephyr-7b-beta", Published
    return {
        "table1-2.8b": Preset(
            _recurrent(mamba_2_8b), _recurrent(mamba_130m),
            (published("3090", 3, 3.01, 2.3, 259), published("3090", 4, 3.28, 2.6, 289),
             published("H100", 3, 4.04, 1.71, 389), published("H100", 4, 3.9, 1.85, 421)),
        ),
        "table1-7b": Preset(
            _recurrent(llama3), teacher_config("llama-3.2-1b"),
            (published("3090", 3, 3.19, 2.1, 109), published("3090", 4, 3.56, 2.1, 110),
             published("H100", 3, 3.28, 1.95, 271), published("H100", 4, 3.6, 2.0, 272)),
        ),
        "table5-zephyr-50-2": _hybrid(zephyr, 0.5, 2, published("3090", 4, 2.48, 1.8)),
        "table5-zephyr-25-2": _hybrid(zephyr, 0.25, 2, published("3090", 4, 2.64, 1.88)),
        "table5-zephyr-50-4": _hybrid(zephyr, 0.5, 4, published("3090", 4, 3.0, 1.81)),
        "table5-zephyr-25-4": _hybrid(zephyr, 0.25, 4, published("3090", 4, 3.0, 1.8)),
        "goal-llama3-50-2": Preset(  # Mamba-2, and a draft of which 70% stands: what CUDA graphs are measured by
            _recurrent(llama3, 0.5, "mamba2"), draft_config(llama3, 2, None), (published("H200 (a goal, not a result)", 4, 2.773, 2.0),)
        ),
        "table5-llama3-50-4": _hybrid("meta-llama-3-8b", 0.5, 4, published("3090", 3, 2.7, 1.6), published("3090", 4, 3.6, 1.58)),
    }  # fmt: skip


def chosen(name: str) -> dict[str, Preset]:
    """The preset of this name, or all whose names start with it. Raises ValueError where there is none."""
    known = presets()
    found = {key: preset for key, preset in known.items() if key == name or key.startswith(f"{name}-")}
    if not found:
        raise ValueError(f"preset must be table1, table5 or one of {', '.join(known)}; got {name}")
    return found


def shrunk(config: PreTrainedConfig, by: int) -> PreTrainedConfig:
    """The shape with fewer layers, heads and tokens, head widths as they are: for trying a preset out."""
    if by == 1:
        return config
    values = config.to_dict()
    hybrid = bool(values.get("mixer"))
    heads, layers = max(config.num_attention_heads // by, 1), max(config.num_hidden_layers // by, 8 if hybrid else 2)
    width = values.get("head_dim") or config.hidden_size // config.num_attention_heads
    plain = LlamaConfig(
        vocab_size=config.vocab_size // by, hidden_size=heads * width, intermediate_size=config.intermediate_size // by,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, head_dim=width,
        max_position_embeddings=config.max_position_embeddings,
    )  # fmt: skip
    if not hybrid:
        return plain
    return _recurrent(plain, sum(kind != RECURRENT for kind in config.layer_types) / len(config.layer_types), values["mixer"]["kind"])


def build(config: PreTrainedConfig, shrink: int, dtype: torch.dtype, device: str) -> Any:
    """A model of this shape with random weights."""
    torch.manual_seed(0)
    with torch.device(device):  # made where it is needed: billions of random numbers take long on a CPU
        made: Any = AutoModelForCausalLM.from_config(shrunk(config, shrink), dtype=dtype)
    return made.to(device).eval()
