"""Files that others made: rows with the place where each stands, so that what is wrong with one can be said in a line."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LocatedRow = tuple[str, Row]  # "FILE line 3", and what stands there


def rows(path: Path) -> list[LocatedRow]:
    """Rows of a .json file (a list of objects) or of JSON lines, the last with or without its newline; empty lines are none.

    Raises ValueError, with file and line, for what cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be text in UTF-8, got {error.object[error.start : error.start + 1]!r} at byte {error.start}"
        ) from error
    if path.suffix == ".json":
        return _of_list(path, text)
    lines = ((f"{path} line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    return [(where, _object(where, line)) for where, line in lines]


def _of_list(path: Path, text: str) -> list[LocatedRow]:
    found = _parsed(str(path), text)
    if not isinstance(found, list):
        raise ValueError(f"{path} must hold a list of JSON objects, got {shown(found)}")
    placed = [(f"{path} row {number}", row) for number, row in enumerate(found, 1)]
    if wrong := next(((where, row) for where, row in placed if not isinstance(row, dict)), None):
        raise ValueError(f"{wrong[0]} must be a JSON object, got {shown(wrong[1])}")
    return placed


def _object(where: str, line: str) -> Row:
    found = _parsed(where, line)
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be a JSON object, got {shown(found)}")
    return found


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be JSON, and is not: {str(error)[:120]}") from error


def shown(value: Any) -> str:
    """A value as a message shows it: as JSON, its beginning if it is long."""
    whole = json.dumps(value) if not isinstance(value, float) or math.isfinite(value) else str(value)
    return whole if len(whole) <= 60 else whole[:57] + "..."


def document(path: Path) -> Row:
    """A file that holds one JSON object. Raises ValueError, with the file's name, for what does not."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, got a byte that is none at {error.start}") from error
    return _object(str(path), text)


def text(placed: LocatedRow, key: str) -> str:
    """A row's text under a key. Raises ValueError where there is none."""
    where, row = placed
    if not isinstance(row.get(key), str):
        raise ValueError(f"{where} must have a text under {key!r}, got {shown(row.get(key))}")
    return row[key]


def name(placed: LocatedRow, key: str) -> int | str:
    """A row's name or number under a key, such as a question_id; "81" is 81. Raises ValueError where there is none."""
    where, row = placed
    value = row.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{where} must have a name or a number under {key!r}, got {shown(value)}")
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 19 else value


def texts(where: str, value: Any, least: int, what: str) -> list[str]:
    """A list of at least so many texts. Raises ValueError for anything else."""
    if not isinstance(value, list) or len(value) < least or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{where} must have {what}, a list of at least {least} texts, got {shown(value)}")
    return value


def number(value: Any) -> float | None:
    """A finite number, None for everything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 else None


def require_unique(placed: Sequence[LocatedRow], key: str) -> None:
    """Raises ValueError where two rows have the same name under a key."""
    seen: dict[Any, str] = {}
    for where, row in placed:
        if (first := seen.setdefault(row[key], where)) != where:
            raise ValueError(f"{where} has the {key} {shown(row[key])} of {first}; each must stand there once")
