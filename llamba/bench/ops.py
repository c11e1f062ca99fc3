"""`llamba bench ops`: whole mixer against whole mixer, ours and transformers'. Theirs run in PyTorch on a CPU, and on CUDA in the
kernels of mamba-ssm and causal-conv1d where both are installed.

Shapes: B = 1, W = 4; on a CPU T = 2,048, D = 512, H = 8, G = 2, P = N = 64 (Mamba-1: N = 16), fp32, uncompiled, 2 threads; on CUDA a
Llama-3-8B mixer, T = D = 4,096, H = 32, G = 8, P = N = 128, bf16. `--shrink` divides T, D, H and G.
Each measurement alternates the two sides and reports medians; peak memory on a CPU is taken in a process of its own.
"""

import argparse
import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BambaConfig, DynamicCache, KimiLinearConfig, MambaConfig, Qwen3NextConfig
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from llamba.base.devices import meant
from llamba.base.provenance import append_row
from llamba.bench.memory import forget_peak, mib
from llamba.kernels.choice import need
from llamba.models.cache import RecurrentLayer
from llamba.models.mixers import AUTO, Recurrence, build_mixer, initialise, mixer_config
from llamba.models.mixers.delta import GatedDelta, written

W = 4
THREADS = 2
ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Run = Callable[[], Any]


class Work(NamedTuple):
    """Shapes of a mixer and its input, and where it runs."""

    device: str
    dtype: torch.dtype
    tokens: int
    heads: int
    groups: int
    width: int

    @property
    def inner(self) -> int:
        """Width of the model and of the mixer's heads together."""
        return self.heads * self.width

    def randn(self, tokens: int, **options: Any) -> Tensor:
        """Input [1, tokens, D]."""
        return torch.randn(1, tokens, self.inner, device=self.device, dtype=self.dtype, **options)


def work_on(device: str, dtype: str, shrink: int) -> Work:
    """What is measured on a device."""
    cuda = device.startswith("cuda")
    tokens, heads, groups, width = (4096, 32, 8, 128) if cuda else (2048, 8, 2, 64)
    kind = DTYPES[("bfloat16" if cuda else "float32") if dtype == "auto" else dtype]
    return Work(device, kind, max(tokens // shrink, 16), max(heads // shrink, 1), max(groups // shrink, 1), width)


class _Cache:
    """The part of a transformers cache that a mixer of ours asks for."""

    def __init__(self, mixer: Any) -> None:
        self.layers = [RecurrentLayer(vars(mixer.config))]


def _ours(kind: str, work: Work, compiled: bool = False) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": work.inner, "heads": work.heads, "groups": work.groups, "head_dim": work.width}
    mixer = build_mixer(vars(mixer_config(kind, shape)), 0)
    initialise(mixer, None, "paper")
    mixer.to(work.device, work.dtype)
    return torch.compile(mixer) if compiled else mixer


def _theirs(kind: str, work: Work) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module
    if kind == "mamba2":
        shape: dict[str, Any] = {
            "mamba_n_heads": work.heads, "mamba_d_head": work.width, "mamba_n_groups": work.groups, "mamba_d_state": work.width,
            "mamba_d_conv": W, "mamba_expand": 1,
        }  # fmt: skip
        made = BambaMixer(BambaConfig(hidden_size=work.inner, **ONE_LAYER, **shape), 0)
    elif kind in ("gated_delta", "kda"):
        made = _their_delta_rule(kind, work)
    else:
        made = MambaMixer(MambaConfig(hidden_size=work.inner, expand=1, state_size=16, conv_kernel=W, num_hidden_layers=1), 0)
    return made.to(work.device, work.dtype)


def _their_delta_rule(kind: str, work: Work) -> nn.Module:
    """Of as many key as value heads: theirs share keys among values, ours share both among queries."""
    one: dict[str, Any] = ONE_LAYER | {"layer_types": ["linear_attention"], "hidden_size": work.inner, "linear_conv_kernel_dim": W}
    if kind == "kda":
        return KimiLinearDeltaAttention(KimiLinearConfig(**one, linear_num_heads=work.heads, linear_head_dim=work.width), 0)
    heads: dict[str, Any] = {"linear_num_value_heads": work.heads, "linear_num_key_heads": work.heads}
    widths: dict[str, Any] = {"linear_key_head_dim": work.width, "linear_value_head_dim": work.width}
    return Qwen3NextGatedDeltaNet(Qwen3NextConfig(**one, **heads, **widths), 0)


def their_kernels(work: Work) -> str:
    """What transformers' mixers run in."""
    there = all(importlib.util.find_spec(package) for package in ("mamba_ssm", "causal_conv1d"))
    return "mamba_ssm" if there and work.device.startswith("cuda") else "torch"


def _forward(mixer: nn.Module, own: bool, u: Tensor, cache: Any = None) -> Tensor:
    if own:
        return mixer(u, past_key_values=cache)[0]
    return mixer(u, cache_params=cache)


def _cache_for(mixer: Any, own: bool, kind: str) -> Any:
    if own:
        return _Cache(mixer.mixer if isinstance(mixer, Placed) else mixer)
    if kind in ("gated_delta", "kda"):
        return DynamicCache(config=Qwen3NextConfig(**ONE_LAYER, layer_types=["linear_attention"]))
    return DynamicCache(config=BambaConfig(**ONE_LAYER))


def _prefill(mixer: nn.Module, own: bool, kind: str, work: Work) -> Run:
    u = work.randn(work.tokens)

    def run() -> None:
        with torch.inference_mode():
            _forward(mixer, own, u)

    return run


def _training_step(mixer: nn.Module, own: bool, kind: str, work: Work) -> Run:
    u, d = work.randn(work.tokens, requires_grad=True), work.randn(work.tokens)

    def run() -> None:
        mixer.zero_grad(set_to_none=True)
        u.grad = None
        _forward(mixer.train(), own, u).backward(d)

    return run


def _decode(mixer: nn.Module, own: bool, kind: str, work: Work, tokens: int = 50) -> Run:
    u, cache = work.randn(1), _cache_for(mixer, own, kind)
    with torch.inference_mode():
        _forward(mixer.eval(), own, work.randn(16), cache)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(tokens):
                _forward(mixer, own, u, cache)

    return run


WORK = {"prefill": _prefill, "training step": _training_step, "decode, 50 tokens": _decode}


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _side(own: bool, kind: str, what: str, work: Work) -> Run:
    return WORK[what](_ours(kind, work) if own else _theirs(kind, work), own, kind, work)


def _peak(own: bool, kind: str, what: str, work: Work, queue: Any) -> None:
    """Peak memory of one run beyond what stood before it, in MiB, put into `queue`. Runs in a fresh process."""
    torch.set_num_threads(THREADS)
    run = _side(own, kind, what, work)
    forget_peak()  # of the imports
    before = mib("VmRSS")
    run()
    queue.put(mib("VmHWM") - before)


def _peak_apart(own: bool, kind: str, what: str, work: Work) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(own, kind, what, work, queue))
    process.start()
    value = queue.get(timeout=600)
    process.join()
    return value


def _peak_on_cuda(run: Run) -> float:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(kind: str, what: str, work: Work, repeats: int) -> dict[str, Any]:
    """One row: median seconds and peak MiB of both sides, and the ratios (theirs / ours)."""
    runs = {own: _side(own, kind, what, work) for own in (True, False)}
    slow = is_slow(kind, what, work)
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
        cuda = work.device.startswith("cuda")
        memory = {own: _peak_on_cuda(run) if cuda else _peak_apart(own, kind, what, work) for own, run in runs.items()}
        row |= {"ours_mib": memory[True], "theirs_mib": memory[False], "memory": memory[True] / memory[False]}
    return row


class Placed(nn.Module):
    """A mixer of ours that is told positions, as it is in a model."""

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, u: Tensor, past_key_values: Any = None) -> Any:
        """u [B, T, D] through the mixer; every token at position 0, which takes as long as any other."""
        angle = u.new_zeros(1, u.shape[1], self.mixer.config.head_dim)
        return self.mixer(u, past_key_values=past_key_values, position_embeddings=(angle + 1, angle))


def measure_own(what: str, work: Work, repeats: int) -> list[dict[str, Any]]:
    """A row for each other mixer of ours that reads whole heads: its median seconds beside plain Mamba-2's, all by turns."""
    mixers = {kind: Placed(_ours(kind, work)) for kind in ("mamba2", AUTO, "gated_delta", "kda", "mamba3")}
    runs = {kind: WORK[what](mixer, True, kind, work) for kind, mixer in mixers.items()}
    times: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(repeats + 1):
        for kind, run in runs.items():
            times[kind].append(_seconds(run))
    medians = {kind: statistics.median(found[1:]) for kind, found in times.items()}
    shared = {"work": what, "mamba2_s": medians["mamba2"], "repeats": repeats}
    return [
        {"mixer": kind, "ours_s": s, "times_of_mamba2": s / medians["mamba2"]} | shared for kind, s in medians.items() if kind != "mamba2"
    ]


class NaiveDelta(GatedDelta):
    """Our mixer with flash-linear-attention's chunked form in plain PyTorch in place of our recurrence."""

    def scan(self, x: Tensor, b: Tensor, c: Tensor | None, dt: Tensor, state: Tensor | None, rec: Recurrence) -> tuple[Tensor, Tensor]:
        """`naive_chunk_gated_delta_rule`, which has one gate: the values are divided by it."""
        a, erase = self.gates(dt)
        x, b = written(x, b)
        x, b = (shared.repeat_interleave(self.config.heads // self.config.groups, 2) for shared in (x, b))
        naive = importlib.import_module("fla.ops.gated_delta_rule.naive").naive_chunk_gated_delta_rule
        return naive(c, b, x / erase[..., None], a, erase, scale=1.0, output_final_state=True)


def measure_naive(work: Work, repeats: int) -> dict[str, Any]:
    """A training step of our Mamba-2, of our gated delta rule, and of that in flash-linear-attention's naive form, by turns."""
    need("gated_delta", "fla")
    mixers = {"mamba2": _ours("mamba2", work), "ours": _ours("gated_delta", work)}
    mixers["naive"] = NaiveDelta(mixers["ours"].config, 0).to(work.device, work.dtype)
    mixers["naive"].load_state_dict(mixers["ours"].state_dict())
    runs = {name: _training_step(mixer, True, "gated_delta", work) for name, mixer in mixers.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            times[name].append(_seconds(run))
    mamba2, ours, naive = (statistics.median(times[name][1:]) for name in runs)
    row: dict[str, Any] = {"mixer": "gated_delta", "work": "training step", "ours_s": ours, "mamba2_s": mamba2, "fla_naive_s": naive}
    return row | {"times_of_mamba2": ours / mamba2, "speedup": naive / ours, "repeats": repeats}


def is_slow(kind: str, what: str, work: Work) -> bool:
    """Whether transformers' side takes minutes: the backward pass of its Mamba-1 in PyTorch is quadratic in T."""
    return kind == "mamba1" and what == "training step" and their_kernels(work) == "torch"


def measure_compiled(kind: str, what: str, work: Work, repeats: int) -> dict[str, Any]:
    """What `torch.compile` adds to ours: median seconds with and without."""
    runs = {name: WORK[what](_ours(kind, work, name), True, kind, work) for name in (False, True)}
    for run in runs.values():
        _seconds(run)
    times = {name: statistics.median(_seconds(run) for _ in range(repeats)) for name, run in runs.items()}
    return {"mixer": kind, "work": what, "ours_s": times[False], "compiled_s": times[True], "compile_speedup": times[False] / times[True]}


def _line(row: dict[str, Any]) -> str:
    if "compiled_s" in row:
        text = f"ours {row['ours_s'] * 1e3:9.1f} ms   compiled {row['compiled_s'] * 1e3:9.1f} ms   x{row['compile_speedup']:.2f}"
    elif "theirs_s" not in row and "fla_naive_s" not in row:
        text = f"ours {row['ours_s'] * 1e3:9.1f} ms   {row['times_of_mamba2']:.2f} x our mamba2's {row['mamba2_s'] * 1e3:.1f} ms"
    elif "fla_naive_s" in row:
        text = f"ours {row['ours_s'] * 1e3:9.1f} ms   fla's naive form {row['fla_naive_s'] * 1e3:9.1f} ms   x{row['speedup']:.2f}"
        text += f"   {row['times_of_mamba2']:.2f} x our mamba2's {row['mamba2_s'] * 1e3:.1f} ms"
    else:
        text = f"ours {row['ours_s'] * 1e3:9.1f} ms   theirs {row['theirs_s'] * 1e3:9.1f} ms   x{row['speedup']:.2f}"
    if "memory" in row:
        text += f"   peak {row['ours_mib']:6.0f} / {row['theirs_mib']:6.0f} MiB = {row['memory']:.2f}"
    return f"{row['mixer']:<11} {row['work']:<18} {text}"


def main(args: argparse.Namespace) -> None:
    """Print the table; with `--out`, append the rows to a .jsonl file with what made them."""
    device = meant(args.device)
    torch.set_num_threads(THREADS)
    work = work_on(device, args.dtype, args.shrink)
    where = {"device": device, "dtype": str(work.dtype), "shrink": args.shrink, "theirs_in": their_kernels(work)}
    if args.fla:
        _report(measure_naive(work, args.repeats), args.out, where)
        return
    if args.own:
        for row in (row for what in WORK for row in measure_own(what, work, args.repeats)):
            _report(row, args.out, where)
        return
    print(f"theirs: transformers' mixers in {where['theirs_in']}")
    for kind in args.mixers:
        for what in WORK:
            if device.startswith("cuda") and is_slow(kind, what, work):
                print(f"{kind:<8} {what:<18} left out: without mamba-ssm, transformers' backward pass is quadratic in T")
                continue
            compiled = args.compile and what != "decode, 50 tokens" and kind == "mamba2"  # Mamba-1's scan compiles for minutes
            measures = [measure] + ([measure_compiled] if compiled else [])
            for made in measures:
                _report(made(kind, what, work, args.repeats), args.out, where)


def _report(row: dict[str, Any], out: str | None, where: dict[str, Any]) -> None:
    print(_line(row), flush=True)
    if out:
        append_row(out, row | where)
