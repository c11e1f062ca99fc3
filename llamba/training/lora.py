"""LoRA (arXiv 2106.09685) and QLoRA (arXiv 2305.14314) through peft: on the projections of kept attention, MLPs and mixers."""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from llamba.base.devices import on_cpu
from llamba.models.loading import load_model
from llamba.settings import Lora
from llamba.training.learnable import mixer_names

_NEEDS = {"peft": "peft: pip install 'llamba[lora]'", "bitsandbytes": "bitsandbytes: pip install 'llamba[qlora]'"}


def _require(package: str, setting: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{setting} needs {_NEEDS[package]}")


def require_packages(lora: Lora) -> None:
    """Raises ValueError where peft, or bitsandbytes for `bits`, is missing."""
    _require("peft", "lora")
    if lora.bits is not None:
        _require("bitsandbytes", "lora.bits=4")


def load_frozen(folder: str, lora: Lora, precision: str) -> PreTrainedModel:
    """The model that stays as it is under LoRA: in bf16 where the stage computes in bf16, or in 4 bits.

    Raises ValueError where peft or bitsandbytes is missing.
    """
    require_packages(lora)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    more: dict[str, Any] = {}
    if lora.bits is not None:
        device = "cpu" if on_cpu() else torch.accelerator.current_device_index()
        more = {"device_map": {"": device}, "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )}  # fmt: skip
    model: PreTrainedModel = load_model(folder, dtype, **more)
    return model.requires_grad_(False)


def targets(student: PreTrainedModel, train: str) -> list[str]:
    """Names of the projections in the student's layers that `train` (as in `llamba.training.learnable.freeze`) lets change."""
    mixers = {name.rpartition(".")[0] for name in mixer_names(student)}
    projections = [name for name, module in student.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    return [name for name in projections if train == "all" or (name in mixers if train == "mixers" else ".mlp." not in name)]


def config(student: PreTrainedModel, lora: Lora, train: str) -> Any:
    """The `peft.LoraConfig` of a stage. Raises ValueError where the student has no projection that `train` names."""
    from peft import LoraConfig

    found = targets(student, train)
    if not found:
        raise ValueError(f"lora with train={train!r} finds no projection to change in this student; use train='all'")
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=found, task_type="CAUSAL_LM")


def merged(model: Any, folder: str) -> PreTrainedModel:
    """The student of `folder` in fp32 with the updates of a trained `PeftModel` added to its weights; peft is not needed to load it."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    student = load_model(folder, torch.float32)
    whole = get_peft_model(student, model.peft_config["default"])
    set_peft_model_state_dict(whole, {name: value.float().cpu() for name, value in get_peft_model_state_dict(model).items()})
    plain: PreTrainedModel = whole.merge_and_unload()
    return plain
