"""Values against annotations: does a value fit, what does a text mean, how is a type called.

Knows the types that recipes use: None, bool, int, float, str, Literal, list[X], tuple[X, Y], dict[str, X] and unions of these.
"""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_NAMES = {NoneType: "none", bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_READ_FIRST = (NoneType, bool, int, float, Literal, list, tuple, str)  # how a union reads an ambiguous text


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def fits(value: object, kind: Any) -> bool:
    """Whether `value` is of type `kind`. An int is a number (float); a bool is neither int nor float."""
    args = get_args(kind)
    if _is_union(kind):
        return any(fits(value, arg) for arg in args)
    if get_origin(kind) is Literal:
        return (type(value), value) in [(type(arg), arg) for arg in args]
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, args[0]) for item in value)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and len(value) == len(args) and all(map(fits, value, args))
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(key, str) and fits(item, args[1]) for key, item in value.items())
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def name_of(kind: Any) -> str:
    """The type in words, for messages."""
    args = get_args(kind)
    if _is_union(kind):
        return " or ".join(name_of(arg) for arg in args)
    if get_origin(kind) is Literal:
        return " or ".join(repr(arg) for arg in args)
    if get_origin(kind) is list:
        return f"a list of {name_of(args[0])}"
    if get_origin(kind) is tuple:
        return f"({', '.join(name_of(arg) for arg in args)})"
    if get_origin(kind) is dict:
        return f"names, each with {name_of(args[1])}"
    return _NAMES.get(kind, kind.__name__)


def _items(text: str) -> list[str]:
    bracketed = text[:1] + text[-1:] in ("[]", "()")
    if not bracketed and "," not in text:
        raise ValueError(text)
    inner = text[1:-1] if bracketed else text
    return [item.strip().strip("\"'") for item in inner.split(",") if item.strip()]


def _read_union(text: str, kinds: tuple[Any, ...]) -> Any:
    for kind in sorted(kinds, key=lambda kind: _READ_FIRST.index(get_origin(kind) or kind)):
        try:
            return read(text, kind)
        except ValueError:
            continue
    raise ValueError(text)


def read(text: str, kind: Any) -> Any:
    """The value of type `kind` that `text` spells, as on a command line: `0.5`, `true`, `none`, `[1,3]`, `0.9,0.98`.

    Raises ValueError where the text spells no such value.
    """
    args = get_args(kind)
    if _is_union(kind):
        return _read_union(text, args)
    if get_origin(kind) is Literal and text in map(str, args):
        return next(arg for arg in args if str(arg) == text)
    if get_origin(kind) is list:
        return [read(item, args[0]) for item in _items(text)]
    if get_origin(kind) is tuple and len(_items(text)) == len(args):
        return tuple(map(read, _items(text), args))
    if kind is NoneType and text.lower() in ("none", "null"):
        return None
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float, str):
        return kind(text)
    raise ValueError(text)
