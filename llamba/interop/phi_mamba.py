"""Checkpoints of Phi-Mamba and Hybrid-Phi-Mamba (arXiv 2408.10189, goombalab/phi-mamba): nested `config.json`, `backbone.` names.

Shapes: D model width.
"""

from pathlib import Path
from typing import Any

from transformers import PhiConfig

from llamba.base.foreign import read_object
from llamba.interop.discrete import layer_table, mixer_options
from llamba.interop.published import Published, Shapes, Take, same
from llamba.models.convert import student_config

MIXER, ATTENTION = "modules.mixers.discrete_mamba2", "modules.mixers.phi_attention"
PHI = (2048, 32)  # width and heads of PhiConfig's defaults, of which their attention is built, whatever the file says of it
TOP = {
    "model.embed_tokens.weight": "backbone.embedding.weight",
    "model.final_layernorm.weight": "backbone.final_layernorm.weight",
    "model.final_layernorm.bias": "backbone.final_layernorm.bias",
    "lm_head.weight": "lm_head.weight",
    "lm_head.bias": "lm_head.bias",
}
AROUND = tuple(f"{name}.{what}" for name in ("input_layernorm", "mlp.fc1", "mlp.fc2") for what in ("weight", "bias"))
KEPT = tuple(f"self_attn.{name}.{what}" for name in ("q_proj", "k_proj", "v_proj", "dense") for what in ("weight", "bias"))


def describe(folder: Path, shapes: Shapes) -> Published:
    """What the checkpoint is, as ours; arguments and errors as in `llamba.interop.mamba_in_llama.describe`."""
    return published(read_object(folder / "config.json"), shapes)


def published(values: dict[str, Any], shapes: Shapes) -> Published:
    """The checkpoint with these values in its `config.json`."""
    blocks = [block for name, block in values.items() if name.startswith("Block")]
    cores = [(block["CoreType"], block.get("core_input") or {}) for block in blocks for _ in range(block["n_layers"])]
    model, language = values["MixerModel"]["input"], values["LanguageModel"]["input"]
    width, multiple = model["d_model"], language.get("pad_vocab_size_multiple", 8)
    unknown = sorted({kind for kind, _ in cores} - {MIXER, ATTENTION})
    if unknown:
        raise ValueError(f"config.json: CoreType must be {MIXER} or {ATTENTION}; got {unknown[0]}")
    mixers = [core for kind, core in cores if kind == MIXER]
    if not mixers or any(core != mixers[0] for core in mixers) or len(cores) != model["n_layer"]:
        raise ValueError("config.json: n_layer must count the blocks' layers, and all mixers must be alike, at least one; they are not")
    kept = [i for i, (kind, _) in enumerate(cores) if kind == ATTENTION]
    phi = PhiConfig(
        vocab_size=-(-language["vocab_size"] // multiple) * multiple,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=len(cores),
        num_attention_heads=_attention_heads(width, [core for kind, core in cores if kind == ATTENTION]),
        num_key_value_heads=None,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    options = mixer_options(width, mixers[0], "config.json")
    config = student_config(phi, "discrete_mamba2", kept, options)
    table = {ours: same(theirs) for ours, theirs in TOP.items()}
    for i in range(len(cores)):
        table |= _layer(i, i in kept, mixers[0], options, shapes)
    notes = ["the tokenizer is that of microsoft/phi-1_5, which the checkpoint does not hold"]
    quirks = ["the step decides the decay alone and has no bias; what is written is not scaled by it"]
    return Published("Hybrid-Phi-Mamba" if kept else "Phi-Mamba", config, table, quirks, notes)


def _attention_heads(width: int, cores: list[dict[str, Any]]) -> int:
    said = next((core["num_attention_heads"] for core in cores if "num_attention_heads" in core), None)
    heads = said if said is not None and width != PHI[0] else PHI[1]
    if cores and width % heads:
        raise ValueError(f"config.json: the attention of a {width} wide model must say num_attention_heads in its core_input; it does not")
    return heads if width % heads == 0 else 1


def _layer(i: int, kept: bool, core: dict[str, Any], options: dict[str, Any], shapes: Shapes) -> dict[str, Take]:
    ours, theirs = f"model.layers.{i}.", f"backbone.layers.{i}."
    table = {ours + name: same(theirs + name) for name in AROUND}
    if kept:
        return table | {ours + name: same(f"{theirs}mixer.{name}") for name in KEPT}
    return table | layer_table(f"{ours}self_attn.", f"{theirs}mixer.", core, options, shapes)
