"""One process at a time where two would spoil each other's work: in an output folder, in a file that grows."""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llamba.base.provenance import command

LOCK = ".lock"
_LONGEST = 160  # characters of a command in a message


def _holder(file: IO[str]) -> str:
    """Who holds a lock, as its file says."""
    file.seek(0)
    try:
        found = json.loads(file.read())
        line = found["command"] if len(found["command"]) <= _LONGEST else found["command"][:_LONGEST] + " ..."
        return f"process {found['pid']} on {found['host']} since {found['since']} ({line})"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _opened(path: Path, what: Path, remedy: str) -> IO[str] | None:
    """The lock's file, locked; None where its last holder removed it in between. Raises ValueError where another process holds it."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        who = _holder(file)
        file.close()
        raise ValueError(f"{what} is in use: {who} works in it; wait for it, stop it, or {remedy}") from error
    if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return file
    file.close()
    return None


@contextmanager
def file_lock(path: Path, what: Path, remedy: str = "choose another output") -> Iterator[None]:
    """Hold the lock file `path`, which guards `what`, against other processes on this machine and on file systems that lock.

    The system gives the lock back when its process ends, however it ends: what a dead process left is no obstacle. Raises ValueError
    that says who holds it: process, machine, since when, by which command.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while (file := _opened(path, what, remedy)) is None:
        pass
    with file:
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since, "command": command()}))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made where there is none, as `file_lock` does."""
    with file_lock(folder / LOCK, folder):
        yield
