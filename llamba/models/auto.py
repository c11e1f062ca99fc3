"""Hybrids in transformers' Auto classes, without importing transformers: the families are loaded when a hybrid is first looked up.

Every way to a hybrid begins with its `model_type` in `CONFIG_MAPPING`: AutoConfig, the Auto models, AutoTokenizer, pipelines, TRL,
lm-eval. Pickled hybrids import `llamba.models.families` by themselves.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PREFIX = "llamba_"
_MAPPING = "transformers.models.auto.configuration_auto"


class _Registered(dict[str, Any]):
    """What was registered with `CONFIG_MAPPING`; asked for a hybrid's model_type, it loads the families, which register themselves."""

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str) and key.startswith(PREFIX) and not super().__contains__(key):
            importlib.import_module("llamba.models.families")
        return super().__contains__(key)


def _teach(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    mapping._extra_content = _Registered(mapping._extra_content)


class _OnImport(MetaPathFinder):
    """Teaches transformers' configuration mapping as soon as its module is imported, once."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _MAPPING:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_and_teach(module: ModuleType) -> None:
                execute(module)
                _teach(module)

            spec.loader.exec_module = exec_and_teach  # type: ignore[method-assign]
        return spec


def teach_auto_classes() -> None:
    """Make the Auto classes know the hybrids: now if transformers has its mapping already, else as soon as it has. Done once, on import."""
    module = sys.modules.get(_MAPPING)
    if module is not None:
        _teach(module)
    else:
        sys.meta_path.insert(0, _OnImport())
