"""One process at a time in an output folder."""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOCK = ".lock"


def _holder(file: IO[str]) -> str:
    """Who holds a lock, as its file says."""
    file.seek(0)
    try:
        found = json.loads(file.read())
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _opened(path: Path) -> IO[str] | None:
    """The lock's file, locked; None where its last holder removed it in between. Raises ValueError where another process holds it."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        who = _holder(file)
        file.close()
        raise ValueError(f"{path.parent} is in use: {who} works in it; wait for it, stop it, or choose another output") from error
    if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return file
    file.close()
    return None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made where there is none, against other processes on this machine and on file systems that lock.

    The system gives the lock back when its process ends, however it ends: what a dead process left is no obstacle. Raises ValueError
    that says who holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while (file := _opened(path)) is None:
        pass
    with file:
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since}))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
