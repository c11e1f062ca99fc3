"""`llamba bench mfu`: a distillation step of an 8B-shaped hybrid on one device, and what part of the device's arithmetic it uses.

Student: Llama-3-8B's shape, half of the layers Mamba-2, the mixers trained and the rest frozen, fp32 weights and bf16 autocast as in
training. Teacher: the same shape in bf16. Random weights, one sequence of 2,048 tokens, all of them targets; `--shrink` divides widths,
layers and tokens. The step is `distill`'s objective, its gradients, clipping and AdamW.
What is counted (one multiply-add is 2): every matrix a token meets, for the teacher's pass, the student's pass, the gradients of the
student's activations, and the gradients of weights that are trained; not the embeddings, which are looked up, and no gradient of the
first mixer's input, which nobody asks for. Causal attention counts 2 T H P a token and layer (half of all pairs, in scores and values), the
SSD 4 H P N (its recurrence: write and read; what chunks do beyond that is not counted), their activation gradients twice that. Norms,
convolutions and elementwise work are not counted, nor is the optimizer; their time is.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from llamba.base.devices import meant
from llamba.base.provenance import append_row
from llamba.bench.shapes import shrunk
from llamba.bench.timing import median_seconds
from llamba.bench.train import DTYPES, ceilings, show_ceilings
from llamba.models.convert import student_config
from llamba.models.hybrid import RECURRENT
from llamba.models.published import teacher_config
from llamba.settings import Distill
from llamba.stages.distill import objective
from llamba.training.learnable import freeze

SHAPE, MIXER, ATTENTION, T = "meta-llama-3-8b", "mamba2", 0.5, 2048


def _made(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> Any:
    """A model of this shape with random weights, made where it runs."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _matrices(model: Any) -> int:
    """Entries of all matrices that a token is multiplied with."""
    return sum(weight.numel() for weight in model.parameters() if weight.ndim == 2) - model.get_input_embeddings().weight.numel()


def _products(model: Any, tokens: int) -> int:
    """Floating-point operations of all matrices and tokens; the last token predicts nothing, so the head does not meet it."""
    return 2 * (tokens * _matrices(model) - model.get_output_embeddings().weight.numel())


def _mixing(config: PreTrainedConfig, tokens: int) -> int:
    """Floating-point operations of a forward pass between positions, for all tokens."""
    values = config.to_dict()
    kinds, heads = values.get("layer_types") or ["full_attention"] * config.num_hidden_layers, config.num_attention_heads
    width = values.get("head_dim") or config.hidden_size // heads
    recurrent = sum(kind == RECURRENT for kind in kinds)
    return tokens * heads * ((len(kinds) - recurrent) * 2 * tokens * width + recurrent * 4 * width * width)


def counted(student: Any, teacher: Any, tokens: int) -> dict[str, float]:
    """Floating-point operations of a step by part, as the head of this file says."""
    trained = sum(weight.numel() for weight in student.parameters() if weight.requires_grad and weight.ndim == 2)
    first = student.model.layers[0].self_attn
    unasked = first.in_proj.weight.numel() if student.config.layer_types[0] == RECURRENT else 0
    between = _mixing(student.config, tokens)
    return {
        "teacher": _products(teacher, tokens) + _mixing(teacher.config, tokens),
        "student": _products(student, tokens) + between,
        "activation_gradients": _products(student, tokens) - 2 * tokens * unasked + 2 * between,
        "weight_gradients": 2 * tokens * trained,
    }


def _step(student: Any, teacher: Any, ids: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    stage, batch = Distill(), {"input_ids": ids, "labels": ids}
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay, fused=ids.is_cuda)

    def run() -> Tensor:
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            sums = objective(stage, student, teacher, batch)
        (sums.loss / sums.targets).backward()
        torch.nn.utils.clip_grad_norm_(weights, stage.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sums.loss.detach()

    return run


def measure(shrink: int, dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """One row: milliseconds of a step, the operations counted in it, and on CUDA peak memory of the device."""
    shape = shrunk(teacher_config(SHAPE), shrink)
    teacher = _made(shape, dtype, device).requires_grad_(False).eval()
    student = _made(student_config(shape, MIXER, ATTENTION), torch.float32, device).train()
    freeze(student, "mixers")
    ids = torch.randint(shape.vocab_size, (1, max(T // shrink, 64)), device=device)
    run = _step(student, teacher, ids, dtype)
    assert torch.isfinite(run()), "random weights of ordinary size give a finite loss"
    seconds, parts = median_seconds(run, device, repeats), counted(student, teacher, ids.shape[1])
    row: dict[str, Any] = {
        "bench": "mfu",
        "ms": seconds * 1e3,
        "tokens": ids.shape[1],
        "tflop": sum(parts.values()) / 1e12,
        "counted": parts,
    }
    row |= {"tflop_s": row["tflop"] / seconds, "trained": sum(w.numel() for w in student.parameters() if w.requires_grad)}
    return row | ({"peak_mib": torch.cuda.max_memory_allocated() / 2**20} if device.startswith("cuda") else {})


def main(args: argparse.Namespace) -> None:
    """Print the step and its part of the measured matrix product; with `--out`, append the row to a .jsonl file with what made it."""
    device = meant(args.device)
    torch.manual_seed(0)
    limits = ceilings(device, args.shrink, args.repeats)
    show_ceilings(limits)
    row = measure(args.shrink, DTYPES[args.dtype], device, args.repeats)
    row |= {"mfu": row["tflop_s"] / limits["matmul_tflop_s"], "device": device, "shrink": args.shrink, "dtype": args.dtype, **limits}
    print(f"step of {row['tokens']} tokens, {row['trained'] / 1e6:.4g} M trained: {row['ms']:.4g} ms, {row['tflop']:.3g} TFLOP counted")
    print("   ".join(f"{name.replace('_', ' ')} {100 * value / row['tflop'] / 1e12:.1f}%" for name, value in row["counted"].items()))
    print(f"{row['tflop_s']:.3g} TFLOP/s, {row['mfu']:.0%} of the matrix product's")
    if args.out:
        append_row(args.out, row)
