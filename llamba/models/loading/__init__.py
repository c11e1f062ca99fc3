"""The one way by which models, configurations and tokenizers come in, wherever one is named.

A name is a run folder (its last finished stage), a model folder, a GGUF file (or a folder with one), or a hub name. What is loaded is
whole: every tensor that config.json asks for, no other, all of them finite numbers. Everything else is a ValueError in one line.
"""

from llamba.models.loading.load import ends_of, has_tokenizer, load_config, load_generation_config, load_model, load_tokenizer, located
from llamba.models.loading.teachers import (
    SPANS_INSTEAD,
    load_teacher,
    require_alike,
    require_bitsandbytes,
    require_model,
    require_same_vocabulary,
    require_sound,
    vocabularies_differ,
)

__all__ = [
    "SPANS_INSTEAD",
    "ends_of",
    "has_tokenizer",
    "load_config",
    "load_generation_config",
    "load_model",
    "load_teacher",
    "load_tokenizer",
    "located",
    "require_alike",
    "require_bitsandbytes",
    "require_model",
    "require_same_vocabulary",
    "require_sound",
    "vocabularies_differ",
]
