"""llamba: pretrained transformers into Mamba hybrids.

Importing it is cheap: torch and transformers are loaded by the first use of a name that needs them. From then on, whichever of the two
was imported first, transformers' Auto classes load hybrids (`llamba.models.auto`).
"""

import importlib
from typing import TYPE_CHECKING, Any

from llamba.models.auto import teach_auto_classes

if TYPE_CHECKING:
    from llamba import speculative
    from llamba.models.convert import convert
    from llamba.running.launch import launch
    from llamba.running.plan import plan
    from llamba.running.run import run
    from llamba.settings import Data, Distill, Dpo, Draft, Hidden, Lora, Matrix, PseudoLabel, Recipe, Select, Sft, Student
    from llamba.speculative import generate

__all__ = [
    "Data", "Distill", "Dpo", "Draft", "Hidden", "Lora", "Matrix", "PseudoLabel", "Recipe", "Select", "Sft", "Student", "convert",
    "generate", "launch", "plan", "run", "speculative",
]  # fmt: skip
_HOMES = {
    "convert": "llamba.models.convert",
    "generate": "llamba.speculative",
    "launch": "llamba.running.launch",
    "plan": "llamba.running.plan",
    "run": "llamba.running.run",
}

teach_auto_classes()


def __getattr__(name: str) -> Any:
    """The public names, each loaded by its first use (PEP 562)."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("llamba")
    if name == "speculative":
        return importlib.import_module("llamba.speculative")
    if name not in __all__:
        raise AttributeError(f"module 'llamba' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "llamba.settings")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
