"""Training checkpoints that are either complete or recognisably not.

A checkpoint is a Trainer folder `checkpoint-<step>`; the empty file COMPLETE is put into it after everything else.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from llamba.base.foreign import reading

COMPLETE = "COMPLETE"
_GIB = 2**30
_TORCH_WRITE_ERRORS = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")  # torch.save on a full disk


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    return sorted((marker.parent for marker in folder.rglob(f"checkpoint-*/{COMPLETE}")), key=_step)


def mark_complete(checkpoint: Path) -> None:
    """Declare a checkpoint complete, then remove the others: they are older or broken."""
    (checkpoint / COMPLETE).touch()
    for other in checkpoint.parent.glob("checkpoint-*"):
        if other != checkpoint:
            remove(other)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, its marker first: a half-removed one is incomplete."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def remove_incomplete(folder: Path) -> None:
    """Remove what an interrupted save left behind."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE).exists():
            remove(checkpoint)


_STATES = {  # what a checkpoint must have: one of these names
    "the optimizer's state": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*", "pytorch_model_fsdp*/optimizer*"),
    "the schedule": ("scheduler.pt",),
    "the trainer's state": ("trainer_state.json",),
    "the model's weights": ("*.safetensors", "pytorch_model*", "global_step*", "adapter_model*"),
}


def require_whole(checkpoint: Path, trained: set[str]) -> None:
    """Raises ValueError for a checkpoint that was made but has lost the optimizer's or the schedule's state or weights that are trained."""
    lost = [what for what, names in _STATES.items() if not any(next(checkpoint.glob(name), None) for name in names)]
    alone = checkpoint / "model.safetensors"
    if alone.is_file():
        with reading(f"{alone} is no whole safetensors file"), safe_open(alone, framework="pt") as opened:
            held = set(opened.keys())
        lost += sorted(trained - held)[:3] if trained & held or not any("lora_" in name for name in trained) else []
    if lost:
        raise ValueError(
            f"{checkpoint} cannot be continued, it has lost {', '.join(lost)}: restore it, or delete it and the stage begins anew"
        )


def last_complete(folder: Path) -> str:
    """The newest complete checkpoint in words, for messages."""
    found = complete(folder)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def bytes_of(model: nn.Module) -> int:
    """Size of a checkpoint: the weights, and two Adam moments for each trained one."""
    return sum(weight.numel() * weight.element_size() * (3 if weight.requires_grad else 1) for weight in model.parameters())


def require_room(folder: Path, needed: int) -> None:
    """Raises ValueError if the disk under `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"disk full: saving to {folder} needs {needed / _GIB:.3f} GiB, {free / _GIB:.3f} GiB are free; {last_complete(folder)}; "
            "free some space and run the same command again"
        )


def _is_disk_full(error: Exception) -> bool:
    """Whether a failed write failed for want of space. (PyTorch and safetensors wrap the operating system's error.)"""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, SafetensorError):
        return "No space left" in str(error)
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_WRITE_ERRORS)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Make one clear ValueError of whatever a library raises when the disk under the run folder `out` is full."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_disk_full(error):
            raise
        raise ValueError(
            f"disk full: could not write to {out}; {last_complete(out)}; free some space and run the same command again"
        ) from error
