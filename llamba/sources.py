"""Rows from where people keep them: `.jsonl`, `.jsonl.gz`, `.parquet`, folders of those, hub sets `org/name:split`."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


def files(source: str) -> list[Path]:
    """The local files of a source, sorted; an empty list for a hub set.

    Raises ValueError for a path that does not exist, a folder without data files, and a file of another format.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        if not found:
            raise ValueError(f"data folder {source} must hold files ending in {', '.join(SUFFIXES)}, found none")
        return found
    if path.is_file():
        if not source.endswith(SUFFIXES):
            raise ValueError(f"data file {source} must end in {', '.join(SUFFIXES)}, or be converted to one of them")
        return [path]
    if source.endswith(SUFFIXES) or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.\[\]%:-]+)?", source) or source.startswith("."):
        raise ValueError(f"data source {source} does not exist; needed a file, a folder, or a hub set written org/name:split")
    return []


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(row: object, where: str) -> Row:
    """The row itself, if it has a text or well-formed messages."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: needed an object with 'messages' or 'text', got {type(row).__name__}")
    messages, text = row.get("messages"), row.get("text")
    if messages is None:
        if not isinstance(text, str):
            raise ValueError(f"{where}: needed 'messages' (a list) or 'text' (a string), got keys {sorted(row)}")
        return {"text": text}
    if not isinstance(messages, list):
        raise ValueError(f"{where}: 'messages' must be a list, got {type(messages).__name__}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: message {number} must be {{'role': text, 'content': text}}, got {str(message)[:80]}")
    return {"messages": [{"role": message["role"], "content": message["content"]} for message in messages]}


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _check(json.loads(line), f"{path}:{number}")
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{number}: needed one JSON object in UTF-8, got: {error}") from None
        except (EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: broken gzip file after line {number}: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: needed a parquet file, got: {error}") from None
    columns = [name for name in table.schema_arrow.names if name in ("messages", "text")]
    number = 0
    for batch in table.iter_batches(columns=columns):
        for row in batch.to_pylist():
            yield f"{path}: row {number}", _check(row, f"{path}: row {number}")
            number += 1


def _hub(source: str) -> Iterator[tuple[str, Row]]:
    import datasets

    name, _, split = source.partition(":")
    for number, row in enumerate(datasets.load_dataset(name, split=split or "train")):
        yield f"{source}: row {number}", _check(row, f"{source}: row {number}")


def rows(source: str) -> Iterator[tuple[str, Row]]:
    """All rows of a source in order, each with the place it stands (file and line number), checked for form.

    Raises ValueError that names the place for a line that is no JSON object and a row without messages or text.
    """
    local = files(source)
    if not local:
        yield from _hub(source)
    for path in local:
        yield from _parquet(path) if path.suffix == ".parquet" else _lines(path)
