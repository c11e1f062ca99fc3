"""Weights that accelerate keeps on the CPU or on disk and brings in for a module's own call alone (`device_map`, `cpu_offload`)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils.modeling import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

CPU = torch.device("cpu")


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights have no values here: they are on the CPU or on disk, or nowhere."""
    return any(parameter.is_meta for parameter in model.parameters())


def reading_device(model: PreTrainedModel) -> torch.device:
    """Where token ids for the model belong: the device of its embedding, or that to which accelerate brings it."""
    embedding = model.get_input_embeddings()
    for hook in _hooks(embedding):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return embedding.weight.device if isinstance(embedding.weight, Tensor) else model.device


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    hook = vars(module).get("_hf_hook")
    both = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [one for one in both if isinstance(one, AlignDevicesHook)]


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Within, all weights of the module and of those below it have values; offloaded ones are on the CPU.

    Raises ValueError for weights without values anywhere.
    """
    with ExitStack() as held:
        for one in module.modules():
            if has_offloaded_params(one):
                held.enter_context(align_module_device(one, CPU))
        _require([name for name, weight in module.named_parameters() if weight.is_meta])
        yield


def all_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """`state_dict()`, with offloaded weights on the CPU. Raises ValueError for weights without values anywhere."""
    whole = model.state_dict()
    for prefix, module in model.named_modules():
        if has_offloaded_params(module):
            with align_module_device(module, CPU):
                own = {f"{prefix}.{name}": weight.detach() for name, weight in module.named_parameters(recurse=False)}
            whole |= {name: weight for name, weight in own.items() if name in whole}
    _require([name for name, weight in whole.items() if weight.is_meta])
    return whole


def _require(missing: list[str]) -> None:
    if missing:
        raise ValueError(
            f"teacher: weights with values are needed; {missing[0]} and {len(missing) - 1} others have none (they are on meta, and "
            "accelerate has no copy); load the model with from_pretrained"
        )
