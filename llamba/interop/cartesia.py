"""Checkpoints of Cartesia's Llamba-1B, 3B and 8B (arXiv 2502.14458, cartesia-ai/edge): `model_type` "llamba", `backbone.` names.

Read in cartesia-ai/edge at 95d8276 (cartesia_pytorch/Llamba): a Llama whose attention is Phi-Mamba's discrete Mamba-2 in every layer.
"""

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from llamba.base.foreign import read_object
from llamba.interop.discrete import layer_table, mixer_options
from llamba.interop.published import Published, Shapes, same
from llamba.models.convert import student_config

NORM_EPS = 1e-5  # of the norms in the layers, whatever config.json says; its norm_epsilon is that of the last norm
MLP: dict[str, Any] = {"intermediate_size": 14336, "bias": False, "act_fn": "silu"}
SSM: dict[str, Any] = {
    "d_state": 64,
    "n_v_heads": 32,
    "n_qk_heads": 32,
    "expand": 1,
    "chunk_size": 128,
    "activation": "identity",
    "bias": False,
}
AROUND = ("input_layernorm.weight", "post_attention_layernorm.weight", *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")))


def describe(folder: Path, shapes: Shapes) -> Published:
    """What the checkpoint is, as ours; arguments and errors as in `llamba.interop.mamba_in_llama.describe`."""
    return published(read_object(folder / "config.json"), shapes)


def published(values: dict[str, Any], shapes: Shapes) -> Published:
    """The checkpoint with these values in its `config.json`."""
    quantised = next((name for name in shapes if name.endswith((".scales", ".biases"))), None)
    if quantised is not None:
        raise ValueError(f"the weights must be those of the original checkpoint; {quantised} is of one that was quantised for MLX")
    mlp, core = values.get("mlp_cfg") or MLP, values.get("ssm_cfg") or SSM
    if values.get("norm_epsilon", NORM_EPS) != NORM_EPS or values.get("lm_head_bias"):
        raise ValueError(f"config.json: norm_epsilon must be {NORM_EPS} and lm_head_bias false, as published; a Llama here has no others")
    width, multiple, layers = values["d_model"], values.get("pad_vocab_size_multiple", 8), values.get("n_layer", 32)
    options = mixer_options(width, core, "config.json: ssm_cfg")
    tied = bool(values.get("tie_embeddings", False))
    llama = LlamaConfig(
        vocab_size=-(-values["vocab_size"] // multiple) * multiple,
        hidden_size=width,
        intermediate_size=mlp["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=options["heads"],
        num_key_value_heads=options["heads"],
        head_dim=options["head_dim"],
        hidden_act=mlp.get("act_fn", "silu"),
        mlp_bias=bool(mlp.get("bias", False)),
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
    )
    table = {"model.embed_tokens.weight": same("backbone.embedding.weight"), "model.norm.weight": same("backbone.final_layernorm.weight")}
    table |= {} if tied else {"lm_head.weight": same("lm_head.weight")}
    biases = [name.replace("weight", "bias") for name in AROUND if "mlp" in name] if llama.mlp_bias else []
    for i in range(layers):
        ours, theirs = f"model.layers.{i}.", f"backbone.layers.{i}."
        table |= {ours + name: same(theirs + name) for name in (*AROUND, *biases)}
        table |= layer_table(f"{ours}self_attn.", f"{theirs}mixer.", core, options, shapes)
    quirks = ["the step decides the decay alone and has no bias; what is written is not scaled by it"]
    notes = ["the tokenizer is that of the Llama it was made from, which the checkpoint may not hold"]
    return Published("Cartesia's Llamba", student_config(llama, "discrete_mamba2", [], options), table, quirks, notes)
