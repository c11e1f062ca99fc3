"""On-policy distillation of a hybrid (experimental): it answers prompts itself, and the teacher corrects its words (GKD, arXiv 2306.13649).

    accelerate launch recipes/experimental/on_policy.py --model runs/mine --teacher meta-llama/Meta-Llama-3-8B-Instruct \
        --data HuggingFaceH4/ultrachat_200k:train_sft --output_dir runs/mine_on_policy

This is TRL's GKDTrainer, itself experimental there, and every setting of its GKDConfig is a flag (`--help`): `--lmbda` is the part
of batches that the student writes, `--beta` 0 is KL(teacher || student) and 1 KL(student || teacher). It holds whole logits of both
models, has neither our resume nor our metrics, and no quality has been measured; two steps of it are tested.
"""

import os
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # said above

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser
from trl.experimental.gkd import GKDConfig, GKDTrainer

import llamba  # noqa: F401  (makes the hybrids known)
from llamba.base.errors import one_line_errors
from llamba.base.folders import resolve_model
from llamba.data.sources import messages, rows
from llamba.training.trainer import CHECKPOINTING


@dataclass
class Models:
    """What to train, what corrects it, and the conversations whose prompts are answered: a file, a folder, or org/name:split."""

    model: str
    teacher: str
    data: str


def main() -> None:
    """Train, and leave the model in `--output_dir`."""
    kinds: Any = (Models, GKDConfig)
    parser = TrlParser(kinds)
    parser.set_defaults(learning_rate=1e-6, save_strategy="no", report_to="none", max_length=1024, **{CHECKPOINTING: False})
    chosen, config = parser.parse_args_and_config()
    student, teacher = resolve_model(chosen.model), resolve_model(chosen.teacher)
    tokenizer = AutoTokenizer.from_pretrained(student)
    conversations = [{"messages": messages(row)} for _, row in rows(chosen.data) if "text" not in row]
    trainer = GKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher, dtype="auto"),
        args=config,
        train_dataset=Dataset.from_list(conversations),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(config.output_dir)


if __name__ == "__main__":
    with one_line_errors():
        main()
