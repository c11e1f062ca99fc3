"""The machine that a plan speaks of: its cores or its GPUs, their memory, and how fast they multiply matrices, measured for two seconds."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from llamba.base.devices import own_device

SECONDS = 2.0  # of measuring, for all number formats together
ROWS = 1024  # tokens of the product that is measured
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


@dataclass(frozen=True)
class Machine:
    """What trains here: `devices` times `name` with `memory` bytes each, and floating-point operations per second by precision."""

    kind: str  # of device, as torch calls it
    name: str
    devices: int
    memory: int
    rates: dict[str, float]

    def __str__(self) -> str:
        rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {precision}" for precision, rate in self.rates.items())
        return f"{self.devices} x {self.name}, {self.memory / 2**30:.1f} GiB; products of matrices, just measured: {rates}"


def _memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine (in a container: what that may use)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [path.read_text().strip() for path in map(Path, _LIMITS) if path.is_file()]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(int(limit) for limit in limits if limit.isdigit())])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def product_rate(width: int, inner: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Floating-point operations per second of [ROWS, width] @ [width, inner], over at least so many seconds."""
    a, b = torch.rand(ROWS, width, dtype=dtype, device=device), torch.rand(width, inner, dtype=dtype, device=device)
    _ = a @ b
    _wait(device)
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds or not done:
        _ = a @ b
        _wait(device)
        done += 1
    return done * 2 * ROWS * width * inner / spent


def measured(config: PreTrainedConfig, precisions: Iterable[str], seconds: float = SECONDS) -> Machine:
    """The machine of this process, multiplying matrices of this model's MLPs in these number formats ("bf16", "fp32")."""
    device, asked = own_device(), sorted(set(precisions))
    sizes = config.hidden_size, config.intermediate_size
    rates = {name: product_rate(*sizes, _DTYPES[name], device, seconds / len(asked)) for name in asked}
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU core"
    count = torch.accelerator.device_count() if device.type != "cpu" else torch.get_num_threads()
    return Machine(device.type, name, count, _memory(device), rates)
