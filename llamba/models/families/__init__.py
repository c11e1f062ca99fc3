"""The families of teachers by their model_type; a new one is a file here, which ends in its FAMILY, and one name in the list."""

from importlib import import_module

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from llamba.models.families.base import Family

NAMES = ["llama", "mistral", "phi", "qwen2", "qwen3"]
FAMILIES: dict[str, Family] = {name: import_module(f"{__name__}.{name}").FAMILY for name in NAMES}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a teacher's or a student's configuration. Raises ValueError for one that is not supported."""
    name = config.model_type.removeprefix("llamba_")
    if name not in FAMILIES:
        raise ValueError(f"teacher: its model_type must be one of {', '.join(FAMILIES)}; got {config.model_type!r}")
    return FAMILIES[name]


def register() -> None:
    """Make AutoConfig and the Auto classes of base models, causal LMs and classifiers know the hybrids. Done once, on import."""
    for family in FAMILIES.values():
        AutoConfig.register(family.config.model_type, family.config)
        AutoModel.register(family.config, family.model)
        AutoModelForCausalLM.register(family.config, family.causal_lm)
        AutoModelForSequenceClassification.register(family.config, family.classifier)


register()
