"""A user's error as one line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends a user's error (ValueError, OSError) as one line on stderr and exit status 2; LLAMBA_TRACEBACK=1 lets it through."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("LLAMBA_TRACEBACK") == "1":
            raise
        rank = os.environ.get("RANK", "0")
        process = "" if rank == "0" else f" (process {rank})"
        print(f"error{process}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
