"""Where models are put: this process's accelerator, or the CPU."""

import os

import torch

from llamba.base.foreign import reading


def processes() -> int:
    """How many processes train together, before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu() -> bool:
    """Whether a launched process works on the CPU: no accelerator, or the launcher's configuration says so."""
    return not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def own_device() -> torch.device:
    """The device of this process among those launched with it, before any process group exists."""
    found = None if on_cpu() else torch.accelerator.current_accelerator()
    return torch.device("cpu") if found is None else torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))


def meant(device: str) -> str:
    """The device that a user's `--device` means: "auto" is the accelerator if there is one, else the CPU.

    A build of torch for an accelerator names it also where there is none. Raises ValueError for a device that is not here.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = "cpu" if found is None else found.type
    with reading(f"--device {device} is no device"):
        kind = torch.device(here if device == "auto" else device)
    count = torch.accelerator.device_count()
    if kind.type not in ("cpu", here) or (kind.index or 0) >= max(1, count):
        raise ValueError(f"--device {device} is not here: this machine has {'no accelerator' if here == 'cpu' else f'{count} x {here}'}")
    return here if device == "auto" else device
