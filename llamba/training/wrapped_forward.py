"""Running other functions as a module's forward pass, so that wrappers and their hooks see an ordinary one."""

from collections.abc import Callable
from typing import Any

from accelerate.utils.modeling import align_module_device
from torch import nn


def inside(wrapper: nn.Module, module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` run as the forward pass of `module`, called through `wrapper` (DDP, DeepSpeed, FSDP or itself).

    So the wrapper's hooks see one ordinary forward pass, whatever the function computes from the module's parts.
    """
    own = module.__dict__.pop("forward", None)  # accelerate may have put a wrapper of its own here

    def restore() -> None:
        module.__dict__.pop("forward", None)
        if own is not None:
            module.__dict__["forward"] = own

    def once(*inputs: Any) -> Any:
        restore()
        with align_module_device(module):  # brings in what accelerate holds on the CPU or on disk
            return function(*inputs)

    module.__dict__["forward"] = once
    try:
        return wrapper(*args)
    finally:
        restore()
