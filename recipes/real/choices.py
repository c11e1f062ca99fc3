"""What a command line may say as `key=value`, as the fields of a frozen value."""

import typing
from typing import TypeVar

from llamba.settings import typed

Chosen = TypeVar("Chosen")


def read(kind: type[Chosen], arguments: list[str]) -> Chosen:
    """A value of the dataclass `kind`. Raises ValueError for a key that it lacks, and for a text that spells no such value."""
    found, hints = {}, typing.get_type_hints(kind)
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if key not in hints or not equals:
            raise ValueError(f"needed {', '.join(f'{name}=...' for name in hints)}; got {argument!r}")
        try:
            found[key] = typed.read(text, hints[key])
        except ValueError:
            raise ValueError(f"{key} must be {typed.name_of(hints[key])}, got {text!r}") from None
    return kind(**found)
