"""Hugging Face's reporters (wandb, tensorboard, trackio, ...): where a stage's numbers go besides metrics.jsonl."""

import os
from pathlib import Path

from transformers.integrations import INTEGRATION_TO_CALLBACK

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"
_ours: set[str] = set()  # folders that stages of this process gave to TensorBoard


def require_reporters(names: list[str] | None) -> None:
    """Raises ValueError for a name that transformers does not know and for a package that is not installed."""
    for name in names or []:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to must name reporters among {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, got {name!r}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except RuntimeError as error:  # says which package is missing
            raise ValueError(f"report_to={name} cannot be used here: {error}") from None


def reporters(names: list[str] | None, folder: Path) -> list[str]:
    """`names` as the Trainer's `report_to`, for the stage folder `folder`, in which TensorBoard's files then lie.

    Raises ValueError as `require_reporters`.
    """
    require_reporters(names)
    if names and os.environ.get(_TENSORBOARD) in {None, *_ours}:  # else the user has chosen; by default it is in the checkpoints' folder
        _ours.add(str(folder / "tensorboard"))
        os.environ[_TENSORBOARD] = str(folder / "tensorboard")
    return names or []
