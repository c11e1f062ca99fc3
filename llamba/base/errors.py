"""How a command ends: a user's error, an interruption and a defect of ours as one line each."""

import os
import select
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

USER_ERROR, DEFECT, INTERRUPTED, NO_READER = 2, 1, 130, 141  # exit statuses
NO_MEMORY = ("OutOfMemoryError", "MemoryError")  # torch's and Python's, by name: torch may not be loaded
_ROOT = Path(__file__).resolve().parents[2]


def _end(status: int, kind: str, message: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    process = "" if rank == "0" else f" (process {rank})"
    print(f"{kind}{process}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(status)


def _place(error: BaseException) -> str:
    """The last line of ours that an error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).resolve().is_relative_to(_ROOT)] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _nobody_reads() -> bool:
    """Whether the other end of standard output has gone, as `head` does."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


@contextmanager
def one_line_errors(interrupted: str = "stopped") -> Iterator[None]:
    """Ends whatever goes wrong as one line on stderr; LLAMBA_TRACEBACK=1 lets it through.

    Exit status 2: a user's error (ValueError, OSError) or a full memory; 130: Ctrl-C, with the line `interrupted`; 141, without
    a word: nobody reads the output any more; 1: an error that this code ought to have foreseen.
    """
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{interrupted}", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(NO_READER)
        if os.environ.get("LLAMBA_TRACEBACK") == "1":
            raise
        _end(USER_ERROR, "error", str(error) or type(error).__name__)
    except Exception as error:
        if os.environ.get("LLAMBA_TRACEBACK") == "1":
            raise
        if type(error).__name__ in NO_MEMORY:
            remedy = "a smaller micro_batch (in a recipe) or --batch, --length or --dtype (of a command) needs less"
            _end(USER_ERROR, "error", f"the memory is full ({error}); {remedy}")
        said = f"{type(error).__name__}: {error} ({_place(error)})"
        _end(DEFECT, "internal error", f"{said}; LLAMBA_TRACEBACK=1 shows where it came from")
