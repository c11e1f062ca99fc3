"""How long a call takes."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def median_seconds(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Median seconds of a call on `device`, after two to warm up."""
    times = []
    for repeat in range(repeats + 2):
        started = time.perf_counter()
        run()
        if device != "cpu":
            torch.accelerator.synchronize()
        if repeat > 1:
            times.append(time.perf_counter() - started)
    return statistics.median(times)
