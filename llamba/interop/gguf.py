"""Mamba-2 hybrids as GGUF files for llama.cpp (and what stands on it: Ollama, LM Studio).

llama.cpp runs them as "granitehybrid", whose mixers are twice as wide as the model: heads that do nothing fill the rest, exactly, because
the norm behind the gate is per head. It has no place for a bias of the mixers' projections.

Shapes: D model width, H heads of ours, K = 2 D / P heads of theirs, P head width.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig

from llamba.base.foreign import read_object
from llamba.interop.stock import BAMBA, Exported, Source, obstacle, stock_config, stock_tensors, write_stock
from llamba.models.loading import load_model
from llamba.models.mixers import MixerConfig

TYPES = ("f32", "f16", "bf16", "q8_0")  # what the converter itself writes; all others come from llama.cpp's own llama-quantize
PACKAGES = {"convert_hf_to_gguf": "convert-hf-to-gguf", "xllamacpp": "xllamacpp"}
NEW, PROMPTS, LOG_PROBABILITY = 16, 4, 5e-3  # what the check generates, and how far log-probabilities of the exact file may be off
TOP = 5  # log-probabilities that are compared at each place
CUDA_STATES = (96, 128, 256)  # state widths for which llama.cpp's scan runs on CUDA


def gguf_obstacle(config: PreTrainedConfig, proj_bias: bool | None = None) -> str | None:
    """Why a student cannot go to llama.cpp, None where it can. `proj_bias`: whether its weights have biases (None: as it is configured)."""
    reason = obstacle(config, BAMBA)
    if reason is not None:
        return reason
    c = MixerConfig(**config.to_dict()["mixer"])
    if c.proj_bias if proj_bias is None else proj_bias:
        return (
            "llama.cpp has no place for the bias of a mixer's projection, and this student's gate is opened by one; convert with "
            'options={"proj_bias": False}'
        )
    if "full_attention" not in config.layer_types:
        return "llama.cpp aborts on a model of this kind in which no layer has attention"
    if config.hidden_size % config.num_attention_heads or c.head_dim != config.hidden_size // config.num_attention_heads:
        return f"llama.cpp takes {config.hidden_size} / {config.num_attention_heads} for the width of a head; got {c.head_dim}"
    if config.to_dict().get("mlp_bias") or config.hidden_act != "silu":
        return "llama.cpp's MLP for it has SiLU and no biases"
    return None


def _padded(name: str, tensor: Tensor, c: MixerConfig, dead: int) -> Tensor:
    """The tensor of a stock mixer with `dead` more heads, which write nothing and whose output nothing reads."""
    width = dead * c.head_dim
    if name in ("in_proj.weight", "conv1d.weight", "conv1d.bias"):
        sizes = [c.inner] * (4 if name.startswith("in_proj") else 3) + ([c.heads] if name.startswith("in_proj") else [])
        parts = tensor.split(sizes)
        return torch.cat([torch.cat((part, part.new_zeros(width if len(part) > c.heads else dead, *part.shape[1:]))) for part in parts])
    if name in ("dt_bias", "A_log", "D"):
        return pad(tensor, (0, dead))
    return pad(tensor, (0, width), value=1.0 if name == "norm.weight" else 0.0)


def padded_tensors(source: Source, dead: int) -> Iterator[tuple[str, Tensor]]:
    """A Bamba's tensors with heads that do nothing."""
    for name, tensor in stock_tensors(source, BAMBA, proj_bias=False):
        own = name.partition(".mamba.")[2]
        yield name, _padded(own, tensor, source.mixer, dead) if own and dead else tensor


def padded_config(config: PreTrainedConfig) -> dict[str, Any]:
    """A Bamba's config.json whose mixers are twice as wide as the model. Raises ValueError for a student that cannot go."""
    reason = gguf_obstacle(config, False)
    if reason is not None:
        raise ValueError(f"llama.cpp cannot hold this student: {reason}")
    heads = 2 * config.hidden_size // config.to_dict()["mixer"]["head_dim"]
    return stock_config(config, BAMBA, proj_bias=False) | {"mamba_expand": 2, "mamba_n_heads": heads, "mamba_n_groups": heads}


def pre_tokenizer(folder: Path) -> str:
    """llama.cpp's name for a byte-level pre-tokenizer, "-" where it is another one (whose name the converter must know)."""
    if not (folder / "tokenizer.json").is_file():
        return "-"
    found = read_object(folder / "tokenizer.json").get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    kinds = [(step.get("type"), step.get("individual_digits", False), step.get("add_prefix_space", False)) for step in steps]
    if kinds == [("ByteLevel", False, False)] and steps[0].get("use_regex", True):
        return "gpt-2"
    return "smollm" if kinds == [("Digits", True, False), ("ByteLevel", False, False)] else "-"


def export_gguf(folder: str | Path, out: str | Path, kind: str = "f32") -> Exported:
    """Write a student as a GGUF file of a type in `TYPES`, after llama.cpp has computed the same with an exact one.

    Raises ValueError for a student that llama.cpp cannot hold (with the reason), for missing packages, where `out` exists, and where
    llama.cpp's greedy tokens or log-probabilities are not transformers'; then nothing is written.
    """
    place = Path(out)
    if place.exists():
        raise ValueError(f"the output must be a new file; {out} exists")
    if kind not in TYPES:
        raise ValueError(
            f"the type must be one of {', '.join(TYPES)}; got {kind} (llama.cpp's own llama-quantize makes others of an f32 file)"
        )
    lost = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if lost:
        raise ValueError(f"GGUF files need the package {lost[0]}; install llamba[gguf]")
    source = Source(folder)
    reason = gguf_obstacle(source.config, source.proj_bias())
    if reason is not None:
        raise ValueError(f"llama.cpp cannot hold this student: {reason}")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as home:
        bamba = Path(home) / "bamba"
        bamba.mkdir()
        config = padded_config(source.config)
        if not write_stock(source, bamba, BAMBA, config, padded_tensors(source, config["mamba_n_heads"] - source.mixer.heads)):
            raise ValueError(f"a GGUF file holds the tokenizer, and {folder} has no tokenizer files")
        made = _converted(bamba, Path(home) / "f32.gguf", "f32")
        notes = [_checked(source, made)]
        if kind != "f32":
            made = _converted(bamba, Path(home) / f"{kind}.gguf", kind)
            notes.append(_compared(source, made, kind))
        made.rename(place)
    if source.mixer.state not in CUDA_STATES:
        notes.append(f"llama.cpp's scan has no CUDA form for states of {source.mixer.state}; on a GPU these layers run on the CPU")
    return Exported(place, f"llama.cpp's granitehybrid, {kind}", notes)


def _converted(bamba: Path, made: Path, kind: str) -> Path:
    command = [sys.executable, "-m", "llamba.interop.gguf_converter", pre_tokenizer(bamba), str(bamba), "--outfile", str(made)]
    done = subprocess.run([*command, "--outtype", kind], capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode or not made.is_file():
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise ValueError(f"llama.cpp's converter must write {kind}; it ended with status {done.returncode}: {last}")
    return made


def asked(
    model: Path, prompts: list[list[int]], new: int, threads: int = 1, exact: bool = True, probabilities: int = TOP
) -> dict[str, Any]:
    """What llama.cpp generates from token ids; see `llamba.interop.llama_cpp.answer`. Raises ValueError where the engine ends otherwise."""
    request = {"model": str(model), "prompts": prompts, "new": new, "threads": threads, "probabilities": probabilities, "exact": exact}
    command = [sys.executable, "-m", "llamba.interop.llama_cpp"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower() or "assert" in line.lower()] or [done.stderr[-200:]]
        raise ValueError(f"llama.cpp must run the file; it ended with status {done.returncode}: {said[-1].strip()}")
    return json.loads(done.stdout)


def _prompts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (24 + 8 * row,), generator=generator).tolist() for row in range(PROMPTS)]


def compared(source: Source, model: Path, new: int = NEW) -> tuple[float, int, int]:
    """Largest difference of log-probabilities (over the likeliest tokens), greedy tokens that are alike, and all of them.

    Both engines read the same random tokens; where greedy tokens part, what follows is not compared.
    """
    own = load_model(source.folder, torch.float32)
    ends = torch.tensor(own.generation_config.eos_token_id or [], dtype=torch.long).flatten()  # the engine is told to go on
    prompts = _prompts(source.config.vocab_size)
    found, worst, alike = asked(model, prompts, new), 0.0, 0
    for prompt, tokens, places in zip(prompts, found["tokens"], found["logprobs"], strict=True):
        with torch.no_grad():
            rows = own(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :].log_softmax(-1)  # [new, V]
        for row, token, tops in zip(rows, tokens, places, strict=True):
            worst = max([worst, *(abs(float(row[int(top)]) - value) for top, value in tops.items())])
            if int(row.index_fill(0, ends, -torch.inf).argmax()) != token:
                break
            alike += 1
    return worst, alike, new * len(prompts)


def _checked(source: Source, made: Path) -> str:
    worst, alike, tokens = compared(source, made)
    if alike != tokens or worst > LOG_PROBABILITY:
        raise ValueError(
            f"llama.cpp must compute what transformers does; greedy tokens are alike in {alike} of {tokens} places, and log-probabilities "
            f"are off by up to {worst:.2g} (at most {LOG_PROBABILITY:g} is allowed)"
        )
    return f"checked in llama.cpp against transformers (f32): {alike} of {tokens} greedy tokens, log-probabilities within {worst:.1e}"


def _compared(source: Source, made: Path, kind: str) -> str:
    worst, alike, tokens = compared(source, made)
    return f"{kind} beside fp32: {alike} of {tokens} greedy tokens before the first that differs, log-probabilities within {worst:.1e}"
