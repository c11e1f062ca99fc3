"""What a gate without a bias costs (llama.cpp has no place for one): before any training, and after a little.

    python recipes/tiny/gate.py [TEACHER TEXT]

By default on the embedded teacher and its own language. Rows go to eval/results/gate_without_bias.jsonl.
"""

import random
import sys
from pathlib import Path
from typing import Any

import torch
from language import conversation
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamba.base.provenance import append_row
from llamba.models.convert import convert

HERE = Path(__file__).parent
STEPS, ROWS, LENGTH, RATE = 60, 4, 128, 1e-3
STARTS: dict[str, dict[str, Any]] = {
    "bias": {},
    "no bias, calibrated": {"options": {"proj_bias": False}},
    "no bias, random (the paper's)": {"options": {"proj_bias": False}},
}


def divergence(student: Any, teacher: Any, rows: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats per token."""
    with torch.no_grad():
        want = teacher(rows).logits.log_softmax(-1)
    return (want.exp() * (want - student(rows).logits.log_softmax(-1))).sum(-1).mean()


def student_of(teacher: Any, start: str) -> Any:
    """The student with this start; a random gate in an otherwise equal one."""
    made = convert(teacher, mixer="mamba2", **STARTS[start])
    if "random" in start:
        generator = torch.Generator().manual_seed(0)
        for layer, kind in zip(made.model.layers, made.config.layer_types, strict=True):
            if kind == "linear_attention":
                gate = layer.self_attn.in_proj.weight.data[: layer.self_attn.config.inner]
                gate.uniform_(-(gate.shape[1] ** -0.5), gate.shape[1] ** -0.5, generator=generator)
    return made


def main(folder: str, text: str) -> None:
    """Measure every start on the same rows."""
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    held_out, rest = rows[: 2 * ROWS], rows[2 * ROWS : 2 * ROWS + STEPS * ROWS]
    for start in STARTS:
        student = student_of(teacher, start)
        before = float(divergence(student.eval(), teacher, held_out).detach())
        optimizer = torch.optim.AdamW([p for name, p in student.named_parameters() if "self_attn" in name], lr=RATE, betas=(0.9, 0.95))
        for step in range(STEPS):
            batch = rest[[(step * ROWS + row) % len(rest) for row in range(ROWS)]]
            divergence(student.train(), teacher, batch).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            after = float(divergence(student.eval(), teacher, held_out))
        name = Path(folder).resolve().name
        row = {"measured": "gate", "teacher": name, "start": start, "untrained": before, "trained": after, "steps": STEPS}
        append_row(HERE.parent.parent / "eval" / "results" / "gate_without_bias.jsonl", row | {"tokens": STEPS * ROWS * LENGTH})
        print(f"{start:<32} KL untrained {before:.3f}, after {STEPS} steps {after:.3f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(sys.argv[1], Path(sys.argv[2]).read_text()[:400_000])
    else:
        rng, tokenizer = random.Random(0), AutoTokenizer.from_pretrained(HERE / "teacher")
        talks = [[{"role": turn["role"], "content": turn["content"]} for turn in conversation(rng)] for _ in range(120)]
        main(str(HERE / "teacher"), "".join(tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks))
