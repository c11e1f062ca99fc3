"""Training stages. Each is `run(stage, student, teacher, data, out) -> metrics` in a file of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamba.data import Prepared
from llamba.stages import distill, hidden, matrix, pseudo_label, select

STAGES: dict[str, Callable[[Any, str, str, Prepared, Path], dict[str, float]]] = {
    "matrix": matrix.run,
    "hidden": hidden.run,
    "distill": distill.run,
    "pseudo_label": pseudo_label.run,
    "select": select.run,
}
