"""What libraries raise over a user's file, as the user's error: one line that names the file."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LONGEST = 300  # characters of a library's own words


def first_words(error: BaseException) -> str:
    """What an error says, in one short line; its type where it says nothing or only a key."""
    said = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    name = type(error).__name__
    said = f"{name}: {said}" if isinstance(error, (LookupError, TypeError, AttributeError, ArithmeticError)) else said or name
    return said if len(said) <= _LONGEST else said[:_LONGEST].rstrip() + " ..."


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Around a library's call that reads what a user named: whatever it raises becomes ValueError(`what`: its first words).

    Libraries fail on broken files with types of every kind (KeyError, RuntimeError, a bare Exception, a panic of Rust code), so all
    are caught. Ours does not belong inside.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {first_words(error)}") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError that names the file for anything else."""
    with reading(f"{path} must hold a JSON object"):
        found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found
