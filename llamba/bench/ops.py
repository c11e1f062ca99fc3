"""`llamba bench ops`: whole mixer against whole mixer, ours and the PyTorch paths that transformers ships.

Shapes: B = 1, T = 2,048, D = 512, H = 8, G = 2, P = N = 64 (Mamba-1: N = 16), W = 4; fp32, uncompiled, 2 threads on a CPU.
Each measurement alternates the two sides and reports medians; peak memory is taken in a process of its own.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BambaConfig, DynamicCache, MambaConfig
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer

from llamba.bench.memory import forget_peak, mib
from llamba.cache import RecurrentLayer
from llamba.mixers import build_mixer, initialise, mixer_config
from llamba.provenance import append_row

T, D, H, G, P, W = 2048, 512, 8, 2, 64, 4
SHAPE = {"hidden_size": D, "heads": H, "groups": G, "head_dim": P}
THREADS = 2
ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1}

Run = Callable[[], Any]


class _Cache:
    """The part of a transformers cache that a mixer of ours asks for."""

    def __init__(self) -> None:
        self.layers = [RecurrentLayer(W)]


def _ours(kind: str, compiled: bool = False) -> Any:
    torch.manual_seed(0)
    mixer = build_mixer(vars(mixer_config(kind, SHAPE)), 0)
    initialise(mixer, None, "paper")
    return torch.compile(mixer) if compiled else mixer


def _theirs(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mamba2":
        shape: dict[str, Any] = {
            "mamba_n_heads": H,
            "mamba_d_head": P,
            "mamba_n_groups": G,
            "mamba_d_state": P,
            "mamba_d_conv": W,
            "mamba_expand": 1,
        }
        return BambaMixer(BambaConfig(hidden_size=D, **ONE_LAYER, **shape), 0)
    return MambaMixer(MambaConfig(hidden_size=D, expand=1, state_size=16, conv_kernel=W, num_hidden_layers=1), 0)


def _forward(mixer: nn.Module, own: bool, u: Tensor, cache: Any = None) -> Tensor:
    if own:
        return mixer(u, past_key_values=cache)[0]
    return mixer(u, cache_params=cache)


def _cache_for(own: bool, kind: str) -> Any:
    if own:
        return _Cache()
    return DynamicCache(config=BambaConfig(**ONE_LAYER))


def _prefill(mixer: nn.Module, own: bool, kind: str) -> Run:
    u = torch.randn(1, T, D)

    def run() -> None:
        with torch.inference_mode():
            _forward(mixer, own, u)

    return run


def _training_step(mixer: nn.Module, own: bool, kind: str) -> Run:
    u, d = torch.randn(1, T, D, requires_grad=True), torch.randn(1, T, D)

    def run() -> None:
        mixer.zero_grad(set_to_none=True)
        u.grad = None
        _forward(mixer.train(), own, u).backward(d)

    return run


def _decode(mixer: nn.Module, own: bool, kind: str, tokens: int = 50) -> Run:
    u, cache = torch.randn(1, 1, D), _cache_for(own, kind)
    with torch.inference_mode():
        _forward(mixer.eval(), own, torch.randn(1, 16, D), cache)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(tokens):
                _forward(mixer, own, u, cache)

    return run


WORK = {"prefill": _prefill, "training step": _training_step, "decode, 50 tokens": _decode}


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _side(own: bool, kind: str, what: str) -> Run:
    return WORK[what](_ours(kind) if own else _theirs(kind), own, kind)


def _peak(own: bool, kind: str, what: str, queue: Any) -> None:
    """Peak memory of one run beyond what stood before it, in MiB, put into `queue`. Runs in a fresh process."""
    torch.set_num_threads(THREADS)
    run = _side(own, kind, what)
    forget_peak()  # of the imports
    before = mib("VmRSS")
    run()
    queue.put(mib("VmHWM") - before)


def _peak_apart(own: bool, kind: str, what: str) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(own, kind, what, queue))
    process.start()
    value = queue.get(timeout=600)
    process.join()
    return value


def measure(kind: str, what: str, repeats: int) -> dict[str, Any]:
    """One row: median seconds and peak MiB of both sides, and the ratios (theirs / ours)."""
    runs = {own: _side(own, kind, what) for own in (True, False)}
    slow = kind == "mamba1" and what == "training step"  # the peer's backward is quadratic in T and takes minutes
    times: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(repeats + 1):
        for own, run in runs.items():
            if own or not slow or repeat == 0:
                seconds = _seconds(run)
                if repeat or (slow and not own):  # the first is a warm-up
                    times[own].append(seconds)
    ours, theirs = (statistics.median(times[own]) for own in (True, False))
    row: dict[str, Any] = {"mixer": kind, "work": what, "ours_s": ours, "theirs_s": theirs, "speedup": theirs / ours, "repeats": repeats}
    if what != "decode, 50 tokens" and not slow:
        memory = {own: _peak_apart(own, kind, what) for own in (True, False)}
        row |= {"ours_mib": memory[True], "theirs_mib": memory[False], "memory": memory[True] / memory[False]}
    return row


def measure_compiled(kind: str, what: str, repeats: int) -> dict[str, Any]:
    """What `torch.compile` adds to ours: median seconds with and without."""
    runs = {name: WORK[what](_ours(kind, name), True, kind) for name in (False, True)}
    for run in runs.values():
        _seconds(run)
    times = {name: statistics.median(_seconds(run) for _ in range(repeats)) for name, run in runs.items()}
    return {"mixer": kind, "work": what, "ours_s": times[False], "compiled_s": times[True], "compile_speedup": times[False] / times[True]}


def _line(row: dict[str, Any]) -> str:
    if "compiled_s" in row:
        text = f"ours {row['ours_s'] * 1e3:9.1f} ms   compiled {row['compiled_s'] * 1e3:9.1f} ms   x{row['compile_speedup']:.2f}"
    else:
        text = f"ours {row['ours_s'] * 1e3:9.1f} ms   theirs {row['theirs_s'] * 1e3:9.1f} ms   x{row['speedup']:.2f}"
    if "memory" in row:
        text += f"   peak {row['ours_mib']:6.0f} / {row['theirs_mib']:6.0f} MiB = {row['memory']:.2f}"
    return f"{row['mixer']:<8} {row['work']:<18} {text}"


def main(args: argparse.Namespace) -> None:
    """Print the table; with `--out`, append the rows to a .jsonl file with what made them."""
    torch.set_num_threads(THREADS)
    for kind in ("mamba2", "mamba1"):
        for what in WORK:
            compiled = args.compile and what != "decode, 50 tokens" and kind == "mamba2"  # Mamba-1's scan compiles for minutes
            measures = [measure] + ([measure_compiled] if compiled else [])
            for made in measures:
                row = made(kind, what, args.repeats)
                print(_line(row), flush=True)
                if args.out:
                    append_row(args.out, row)
