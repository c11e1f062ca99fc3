"""Training stages. Each is `run(stage, student, teacher, data, out) -> metrics` in a file of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamba.data.tokens import StageData
from llamba.stages import distill, draft, hidden, matrix, pseudo_label, select


def _sft(*args: Any) -> dict[str, float]:
    from llamba.stages import sft  # here, so that other stages need not import TRL

    return sft.run(*args)


def _dpo(*args: Any) -> dict[str, float]:
    from llamba.stages import dpo

    return dpo.run(*args)


STAGES: dict[str, Callable[[Any, str, str, StageData, Path], dict[str, float]]] = {
    "matrix": matrix.run,
    "hidden": hidden.run,
    "distill": distill.run,
    "draft": draft.run,
    "pseudo_label": pseudo_label.run,
    "select": select.run,
    "sft": _sft,
    "dpo": _dpo,
}
