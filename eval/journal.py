"""A file of JSON lines that only grows while work goes on: what stands in it survives a kill, a full disk and a second start."""

import json
import os
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from llamba.base.locks import file_lock

BALLAST = 1 << 20  # bytes kept aside, given back when the disk is full, so that replies on their way can still be written


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of JSON lines; a last line that was cut off is left out, a missing file has none.

    Raises ValueError for another line that is not a JSON object.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is None:
            raise ValueError(f"{path} line {number} must be a JSON object, got {line[:60]!r}; repair or delete the file")
        found.append(row)
    whole = _row(last)
    return found if whole is None else [*found, whole]


def _row(line: bytes) -> dict[str, Any] | None:
    """A line as a row, None for what is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _line(row: dict[str, Any]) -> bytes:
    """A row as a line; half a surrogate pair, which UTF-8 cannot hold, becomes its JSON escape."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a file by these rows, all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"".join(map(_line, rows)))
    os.replace(partial, path)


class Journal:
    """An append-only file of rows, for one process at a time; `rows` holds what stands in it.

    Raises ValueError where another process has it open, and says which; OSError (once, by the `append` that met it) where the disk is
    full: the row of that call is written all the same if the ballast makes the room for it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opening:  # gives the lock back where the file cannot be read
            opening.enter_context(file_lock(path.with_name(path.name + ".lock"), path, "choose another --out"))
            self.rows = read_lines(path)
            self.file = opening.enter_context(path.open("a+b"))
            self._cut_torn_line()
            self.closing = opening.pop_all()
        self.ballast = path.with_name(path.name + ".ballast")
        self.ballast.write_bytes(bytes(BALLAST))

    def _cut_torn_line(self) -> None:
        """End the last line where it is whole, cut it off where it is not."""
        whole, newline, last = self.path.read_bytes().rpartition(b"\n")
        if _row(last) is None:
            self.file.truncate(len(whole) + len(newline))
        else:
            self._write(b"\n")
        self.file.seek(0, os.SEEK_END)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row, down to the disk."""
        line = _line(row)
        with self.lock:
            end = self.file.seek(0, os.SEEK_END)
            try:
                self._write(line)
            except OSError:
                self.file.truncate(end)
                self.ballast.unlink(missing_ok=True)
                self._write(line)
                self.rows.append(row)
                raise
            self.rows.append(row)

    def _write(self, line: bytes) -> None:
        written = 0
        while written < len(line):
            written += os.write(self.file.fileno(), line[written:])
        os.fsync(self.file.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ballast.unlink(missing_ok=True)
        self.closing.close()
