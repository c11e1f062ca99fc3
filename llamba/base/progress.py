"""How far a long piece of work is, on standard error: a bar on a terminal, now and then a line elsewhere."""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
EVERY = 10.0  # seconds between two lines


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _lines(items: Iterable[Item], what: str, unit: str, total: int | None) -> Iterator[Item]:
    started = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said >= EVERY:
            spent, said = now - started, now
            left = "" if total is None else f", about {_clock(spent / done * (total - done))} left"
            print(f"{what}: {done}{'' if total is None else f' of {total}'} {unit}, {_clock(spent)}{left}", file=sys.stderr, flush=True)
        yield item


def progress(items: Iterable[Item], what: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """The items, while it is shown how many of them are done. Of several processes the first one shows it.

    `total`: how many there are, by default `len(items)` where that is known.
    """
    total = len(items) if total is None and isinstance(items, Sized) else total
    if os.environ.get("RANK", "0") != "0":
        return iter(items)
    if not sys.stderr.isatty():
        return _lines(items, what, unit, total)
    from tqdm import tqdm

    return iter(tqdm(items, desc=what, unit=f" {unit}", total=total, delay=1.0, leave=False, dynamic_ncols=True))


def quiet_libraries() -> None:
    """Outside a terminal, no bars of transformers and of the hub, loaded already or not."""
    if sys.stderr.isatty():
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging = sys.modules.get("transformers.utils.logging")
    if logging is not None:
        logging.disable_progress_bar()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says now and then, outside a terminal, that `what` is still going on: for calls that cannot be divided."""
    done = threading.Event()

    def say() -> None:
        started = time.monotonic()
        while not done.wait(EVERY):
            print(f"{what}: {_clock(time.monotonic() - started)}", file=sys.stderr, flush=True)

    if not sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        threading.Thread(target=say, daemon=True).start()
    try:
        yield
    finally:
        done.set()
