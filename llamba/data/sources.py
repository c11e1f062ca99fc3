"""Rows from where people keep them: `.jsonl`, `.jsonl.gz`, `.parquet`, folders of those, hub sets `org/name:split`."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Message = dict[str, str]
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
COLUMNS = ("messages", "conversations", "prompt", "chosen", "rejected", "text")
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?::([\w.\[\]%:-]+))?")


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
    if source.endswith(SUFFIXES) or not _HUB.fullmatch(source) or source.startswith("."):
        raise ValueError(f"data source {source} does not exist; needed a file, a folder, or a hub set written org/name:split")
    return []


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}  # of ShareGPT's rows


def _messages(value: object, where: str, key: str) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: {key!r} must be a list, got {type(value).__name__}")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not all(isinstance(message.get(part), str) for part in ("role", "content")):
            raise ValueError(f"{where}: message {number} must be {{'role': text, 'content': text}}, got {str(message)[:80]}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _conversations(value: object, where: str) -> list[Message]:
    """ShareGPT's form: a list of {"from": "human", "value": text}."""
    if not isinstance(value, list):
        raise ValueError(f"{where}: 'conversations' must be a list, got {type(value).__name__}")
    for number, turn in enumerate(value):
        if not isinstance(turn, dict) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
            raise ValueError(f"{where}: turn {number} must be {{'from': one of {list(_ROLES)}, 'value': text}}, got {str(turn)[:80]}")
    return [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in value]


def _pair(row: dict[str, Any], where: str) -> Row:
    """A preference pair as messages: prompt, and the last message of each answer."""
    sides = {}
    for key in ("chosen", "rejected"):
        value = row.get(key)
        sides[key] = [{"role": "assistant", "content": value}] if isinstance(value, str) else _messages(value, where, key)
    prompt = row.get("prompt")
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt or [], where, "prompt")
    if any(message["role"] == "user" for message in sides["chosen"]):  # both sides repeat the prompt
        prompt = sides["chosen"][:-1]
        if sides["rejected"][:-1] != prompt:
            raise ValueError(
                f"{where}: 'chosen' and 'rejected' must differ in the last message alone, got different conversations before it"
            )
    return {"prompt": prompt, "chosen": sides["chosen"][-1:], "rejected": sides["rejected"][-1:]}


def _check(row: object, where: str) -> Row:
    """The row as `text`, `messages`, or `prompt`, `chosen` and `rejected`."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: needed an object with 'messages' or 'text', got {type(row).__name__}")
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return _pair(row, where)
    if row.get("messages") is not None:
        return {"messages": _messages(row["messages"], where, "messages")}
    if row.get("conversations") is not None:
        return {"messages": _conversations(row["conversations"], where)}
    if isinstance(row.get("text"), str):
        return {"text": row["text"]}
    raise ValueError(f"{where}: needed 'messages' (a list), 'text' (a string) or 'prompt', 'chosen', 'rejected', got keys {sorted(row)}")


def messages(row: Row) -> list[Message]:
    """The conversation of a row with messages, or of a preference pair with the chosen answer."""
    found: list[Message] = row["messages"] if "messages" in row else row["prompt"] + row["chosen"]
    return found


def _whole(found: object, line: bytes, where: str) -> Row:
    """A line's row, checked; its text can be written as UTF-8, which half a surrogate pair cannot."""
    row = _check(found, where)
    if b"\\u" in line:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff alone) is no character") from error
    return row


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _whole(json.loads(line), line, f"{path}:{number}")
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: needed one JSON object in UTF-8, got: {error}") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: broken gzip file after line {number}: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: needed a parquet file, got: {error}") from None
    columns = [name for name in table.schema_arrow.names if name in COLUMNS]
    number = 0
    for batch in table.iter_batches(columns=columns):
        for row in batch.to_pylist():
            yield f"{path}: row {number}", _check(row, f"{path}: row {number}")
            number += 1


def _hub_parts(source: str) -> tuple[str, str | None, str]:
    match = _HUB.fullmatch(source)
    assert match, source
    name, config, split = match.groups()
    return name, config, split or "train"


def _hub(source: str, streaming: bool) -> Iterator[tuple[str, Row]]:
    import datasets

    name, config, split = _hub_parts(source)
    for number, row in enumerate(datasets.load_dataset(name, config, split=split, streaming=streaming)):
        yield f"{source}: row {number}", _check(row, f"{source}: row {number}")


def licence(source: str) -> str | None:
    """The licence as the source gives it: a hub set's card, or the first line of a folder's LICENSE file."""
    local = files(source)
    if not local:
        import datasets

        name, config, _ = _hub_parts(source)
        return datasets.load_dataset_builder(name, config).info.license or None
    stated = Path(source) / "LICENSE"
    return stated.read_text().strip().partition("\n")[0] if stated.is_file() else None


def rows(
    source: str, streaming: bool = False, part: tuple[int, int] | None = None, start: int = 0, stop: int | None = None
) -> Iterator[tuple[str, Row]]:
    """All rows of a source in order, each with the place it stands (file and line number), checked for form.

    A row is {"text"}, {"messages"} or {"prompt", "chosen", "rejected"}, the latter three lists of messages. `streaming`
    reads a hub set as it is needed, not whole; `part` (k, n) takes every n-th row from row k on; `start` and `stop` count
    the rows that are left. Raises ValueError that names the place for a line that is no JSON object and for a row of
    another form.
    """
    first, every = part or (0, 1)
    yield from islice(islice(_all_rows(source, streaming), first, None, every), start, stop)


def _all_rows(source: str, streaming: bool) -> Iterator[tuple[str, Row]]:
    local = files(source)
    if not local:
        yield from _hub(source, streaming)
    for path in local:
        yield from _parquet(path) if path.suffix == ".parquet" else _lines(path)
