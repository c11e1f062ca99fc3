"""Drafts for speculative decoding: a few layers of a teacher, its embeddings and its head, which may be pruned.

Source: Mamba-in-Llama (arXiv 2408.15237), section 4.3: layers 0 and 31, or 0, 10, 20 and 31, of 32.
"""

import copy
import re
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llamba.models.families import family_of
from llamba.models.offloaded import all_weights

_LAYER = re.compile(r"(.*\blayers)\.(\d+)\.(.*)")


def chosen_layers(layers: int | list[int], total: int) -> list[int]:
    """The layers of a draft: those listed, or so many, evenly spaced from the first to the last. Raises ValueError for others."""
    if isinstance(layers, int):
        if layers > total:
            raise ValueError(f"draft.layers must be at most the teacher's {total} layers; got {layers}")
        return [place * (total - 1) // max(layers - 1, 1) for place in range(layers)]
    if not all(0 <= layer < total for layer in layers):
        raise ValueError(f"draft.layers must be layers of the teacher, 0 to {total - 1}; got {layers}")
    return layers


def draft_config(teacher: PreTrainedConfig, layers: int | list[int], head: int | None) -> PreTrainedConfig:
    """The configuration of a draft: the teacher's own class, or ours where the head is pruned to `head` tokens.

    Raises ValueError for layers that the teacher does not have, and a head larger than the vocabulary.
    """
    values = teacher.to_dict()
    kept = chosen_layers(layers, teacher.num_hidden_layers)
    values["num_hidden_layers"] = len(kept)
    if values.get("layer_types"):
        values["layer_types"] = [values["layer_types"][layer] for layer in kept]
    if head is None:
        return type(teacher)(**values)
    if not 1 <= head <= teacher.vocab_size:
        raise ValueError(f"draft.head must be 1 to the vocabulary's {teacher.vocab_size} tokens; got {head}")
    family = family_of(teacher)
    plain = "full_attention" if values.get("sliding_window") is None else "sliding_attention"
    for key in ("model_type", "architectures", "_name_or_path", "auto_map", "transformers_version", "quantization_config"):
        values.pop(key, None)
    own = {"layer_types": values.get("layer_types") or [plain] * len(kept), "head_tokens": head, "tie_word_embeddings": False}
    return family.config(**{**values, **own}, architectures=[family.causal_lm.__name__])


def make_draft(teacher: PreTrainedModel, layers: int | list[int], tokens: Tensor | None = None) -> Any:
    """An untrained draft with copies of the teacher's weights. `tokens` [K]: what a pruned head has (None: all).

    Raises ValueError for layers that the teacher does not have.
    """
    config = draft_config(teacher.config, layers, None if tokens is None else len(tokens))
    places = {layer: place for place, layer in enumerate(chosen_layers(layers, teacher.config.num_hidden_layers))}
    values: dict[str, Tensor] = {}
    for name, value in all_weights(teacher).items():
        found = _LAYER.fullmatch(name)
        if found is None:
            values[name] = value
        elif int(found[2]) in places:
            values[f"{found[1]}.{places[int(found[2])]}.{found[3]}"] = value
    if tokens is not None:
        values |= {name: value[tokens] for name, value in values.items() if name.startswith("lm_head.")} | {"lm_head.tokens": tokens}
    draft: Any = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype)
    draft.load_state_dict(values)
    draft.generation_config = copy.deepcopy(teacher.generation_config)
    return draft.eval()
