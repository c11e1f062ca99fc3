"""Recipes as text: `key=value` on a command line, and JSON beside the weights.

Keys are dotted: `student.attention`, `student.options.window`, `stages.0.lr`, or `stages.distill.lr` where only one stage has that name.
`stages.0.data.train` gives a stage data of its own, which start from the recipe's; `stages.sft.lora.rank` gives it LoRA.
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from typing import Any, get_type_hints

from llamba.settings import STAGE_CONFIGS, Aligning, Data, Lora, Stage
from llamba.settings.common import Option
from llamba.settings.recipe import Recipe, Student
from llamba.settings.typed import name_of, read

OPTIONS = "student.options."  # any name may follow: the mixer knows its own


def _paths(stages: Sequence[Stage]) -> dict[str, int]:
    """The words that may follow `stages.`, each with the index it means."""
    names = [stage.name for stage in stages]
    unique = {name: index for index, name in enumerate(names) if names.count(name) == 1}
    return {str(index): index for index in range(len(names))} | unique


def _parts(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The stage's own data and LoRA, or what they start from."""
    parts: dict[str, Any] = {"data": stage.data or recipe.data}
    return parts | {"lora": stage.lora or Lora()} if isinstance(stage, Aligning) else parts


def keys(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Every key that may be overridden, with its present value and its type."""
    nodes: dict[str, Any] = {"": recipe, "student.": recipe.student, "data.": recipe.data}
    for word, index in _paths(recipe.stages).items():
        nodes[f"stages.{word}."] = recipe.stages[index]
        nodes |= {f"stages.{word}.{name}.": part for name, part in _parts(recipe, recipe.stages[index]).items()}
    found = {}
    for prefix, node in nodes.items():
        hints = get_type_hints(type(node))
        for field in dataclasses.fields(node):
            if field.name not in ("student", "data", "lora", "stages"):
                found[prefix + field.name] = (getattr(node, field.name), hints[field.name])
    return found


def _replace(recipe: Recipe, key: str, value: Any) -> Recipe:
    room, _, rest = key.partition(".")
    if key.startswith(OPTIONS):
        return _replace(recipe, "student.options", {**recipe.student.options, key.removeprefix(OPTIONS): value})
    if room == "stages":
        word, _, name = rest.partition(".")
        stages = list(recipe.stages)
        index = _paths(stages)[word]
        name, _, inner = name.partition(".")
        if inner:
            value = dataclasses.replace(_parts(recipe, stages[index])[name], **{inner: value})
        stages[index] = dataclasses.replace(stages[index], **{name: value})
        return dataclasses.replace(recipe, stages=stages)
    if rest:
        return dataclasses.replace(recipe, **{room: dataclasses.replace(getattr(recipe, room), **{rest: value})})
    return dataclasses.replace(recipe, **{room: value})


def override(recipe: Recipe, assignments: Sequence[str], source: str) -> Recipe:
    """The recipe with `key=value` texts applied in order. `source` is the recipe's file, named in errors.

    Raises ValueError for a text without `=`, an unknown key (naming the nearest), a value of the wrong type, and a
    value that the recipe itself refuses.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"needed key=value, got {assignment!r}; --help lists the keys of {source}")
        known = keys(recipe)
        if key.startswith(OPTIONS) and "." not in key.removeprefix(OPTIONS):
            known[key] = (None, Option)
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise ValueError(f"unknown key {key!r} in {source}; the nearest is {near[0]!r}, --help lists all")
        try:
            value = read(text, known[key][1])
        except ValueError:
            raise ValueError(f"{key} must be {name_of(known[key][1])}, got {text!r}") from None
        recipe = _replace(recipe, key, value)
    return recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values; `from_dict` is the inverse."""
    stages = [{"stage": stage.name, **dataclasses.asdict(stage)} for stage in recipe.stages]
    plain: dict[str, Any] = json.loads(json.dumps({**dataclasses.asdict(recipe), "stages": stages}))
    return plain


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {names}")
    return cls(**values)


def from_dict(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """The recipe that `to_dict` wrote. Raises ValueError for unknown keys and stages, and for values out of range."""
    stages = []
    for number, entry in enumerate(values["stages"]):
        entry = dict(entry)
        name = entry.pop("stage", None)
        if name not in STAGE_CONFIGS:
            raise ValueError(f"{where}: stage {number} must be one of {sorted(STAGE_CONFIGS)}, got {name!r}")
        if entry.get("data") is not None:
            entry["data"] = _build(Data, entry["data"], f"{where}: stage {number}: data")
        if entry.get("lora") is not None:
            entry["lora"] = _build(Lora, entry["lora"], f"{where}: stage {number}: lora")
        stages.append(_build(STAGE_CONFIGS[name], entry, f"{where}: stage {number}"))
    parts = {
        "student": _build(Student, values["student"], f"{where}: student"),
        "data": _build(Data, values["data"], f"{where}: data"),
        "stages": stages,
    }
    recipe: Recipe = _build(Recipe, {**values, **parts}, where)
    return recipe


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two nested JSON values differ."""
    found: list[str] = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, list) and isinstance(after, list) and any(isinstance(item, dict) for item in before + after):
            before, after = dict(enumerate(before)), dict(enumerate(after))
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {json.dumps(before)} -> {json.dumps(after)}")
    return found


def read_options(texts: Sequence[str]) -> dict[str, Option]:
    """Options of a mixer from `name=value` texts. Raises ValueError for a text without `=`."""
    options: dict[str, Option] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option needs name=value, such as window=64; got {text!r}")
        options[name] = read(value, Option)
    return options
