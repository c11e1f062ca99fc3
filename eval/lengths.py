"""Memory and speed by context length, against the teacher: what a state of fixed size is for.

For each model and length, in a fresh process on a CPU (its peak memory is the process's), in this one on a GPU: prefill of T random
tokens, then greedy decoding of `new` tokens with the cache that prefill left. Seconds are medians of `repeats`, after a warm-up.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamba.base.axes import plain
from llamba.chat.conversation import load
from llamba.eval.scores import model_name, save, score
from llamba.models.cache import RecurrentLayer


@dataclass(frozen=True)
class Options:
    """What to measure: prefill lengths, tokens decoded after each, repeats."""

    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    new: int = 32
    repeats: int = 3
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if min(self.lengths) < 1 or self.new < 1 or self.repeats < 1:
            raise ValueError("--lengths, --new-tokens and --repeats must be at least 1")


@dataclass(frozen=True)
class Measured:
    """Prefill and decoding in tokens per second, peak memory and the cache alone in MiB."""

    prefill: float
    decode: float
    peak: float
    cache: float


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache's layers hold, keys and values of windows among them."""
    rings = [layer.ring for layer in cache.layers if isinstance(layer, RecurrentLayer) and layer.ring is not None]
    held = [value for part in (*cache.layers, *rings) for value in vars(part).values()]
    tensors = [t for value in held for t in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(t, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in {t.data_ptr(): t for t in tensors}.values())


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def _measure_once(model: Any, ids: torch.Tensor, new: int) -> tuple[float, float, int]:
    """Seconds of prefill and of decoding, and the cache's bytes after prefill. ids [1, T]."""
    _wait(model)
    start = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    _wait(model)
    middle, size, token = time.perf_counter(), cache_bytes(out.past_key_values), out.logits[:, -1:].argmax(-1)
    decoding = time.perf_counter()
    for _ in range(new):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    _wait(model)
    return middle - start, time.perf_counter() - decoding, size


def _peak(model: Any) -> float:
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def measure(name: str, length: int, options: Options) -> Measured:
    """One model at one length, in this process."""
    model, _ = load(name, options.dtype, options.device)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    _measure_once(model, ids[:, : min(length, 64)], 2)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = [_measure_once(model, ids, options.new) for _ in range(options.repeats)]
    prefill, decode = (statistics.median(times) for times in list(zip(*found, strict=True))[:2])
    return Measured(length / prefill, options.new / decode, _peak(model), found[0][2] / 2**20)


def _in_own_process(queue: Any, threads: int, *arguments: Any) -> None:
    torch.set_num_threads(threads)
    queue.put(measure(*arguments))


def measure_apart(name: str, length: int, options: Options) -> Measured | None:
    """The same in a process of its own; None where that process died (out of memory)."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_in_own_process, args=(queue, torch.get_num_threads(), name, length, options))
    process.start()
    process.join()
    return None if queue.empty() else queue.get()


def run(names: Sequence[str], out: Path, options: Options) -> str:
    """Measure models (the student, then the teacher) at all lengths; rows, a picture, and the table. A length that does not fit is said."""
    lines, rows, curves = [f"{'model':<28}{'tokens':>8}{'prefill tok/s':>15}{'decode tok/s':>14}{'peak MiB':>10}{'cache MiB':>11}"], [], {}
    for name in names:
        shown = model_name(name)
        curves[shown] = found = {length: measure_apart(name, length, options) for length in options.lengths}
        for length, one in found.items():
            if one is None:
                lines.append(f"{shown:<28}{length:>8}  did not fit into memory")
                continue
            lines.append(f"{shown:<28}{length:>8}{one.prefill:>15,.0f}{one.decode:>14,.1f}{one.peak:>10,.0f}{one.cache:>11,.1f}")
            rows += [score("lengths", f"{what} at {length}", shown, getattr(one, key), length=length) for key, what in _NAMES.items()]
    save(out, rows)
    draw({name: {k: v for k, v in found.items() if v} for name, found in curves.items()}, out / "lengths.png")
    return "\n".join([*lines, f"picture: {out / 'lengths.png'}"])


_NAMES = {"prefill": "prefill, tokens/s", "decode": "decode, tokens/s", "peak": "peak MiB", "cache": "cache MiB"}


def read_curves(rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, Measured]]:
    """Models and what was measured at each length, from score rows."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        if row["benchmark"] == "lengths" and "length" in row:
            at = found.setdefault(row["model"], {}).setdefault(row["length"], {})
            at[row["metric"].partition(" at ")[0]] = row["value"]
    whole = {
        model: {
            length: Measured(**{key: at[name] for key, name in _NAMES.items()})
            for length, at in sorted(lengths.items())
            if set(_NAMES.values()) <= set(at)
        }
        for model, lengths in found.items()
    }
    return {model: lengths for model, lengths in whole.items() if lengths}


def draw(curves: dict[str, dict[int, Measured]], path: Path) -> None:
    """Decoding speed, peak memory and cache by length, a line per model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axes, (key, label) in zip(
        figure.subplots(1, 3), (("decode", "decode, tokens/s"), ("peak", "peak memory, MiB"), ("cache", "cache, MiB")), strict=True
    ):
        for name, found in curves.items():
            axes.plot(list(found), [getattr(one, key) for one in found.values()], marker="o", label=name)
        axes.set(xlabel="context, tokens", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({length for found in curves.values() for length in found}))
        axes.xaxis.set_major_formatter(plain)
        axes.yaxis.set_major_formatter(plain)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
