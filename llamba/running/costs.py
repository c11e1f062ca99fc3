"""What a stage takes, by arithmetic alone: bytes and floating-point operations."""

from dataclasses import dataclass
from typing import TypeGuard

import torch
from transformers import PreTrainedConfig

from llamba.models.families import family_of
from llamba.models.hybrid import RECURRENT, mixer_layers
from llamba.running.counts import Counts
from llamba.settings import Aligning, Distill, Dpo, Hidden, Lora, Matrix, Training
from llamba.training.learnable import is_new

NF4_BITS = 4.127  # per weight, with the scales of blocks of 64 (doubly quantised; arXiv 2305.14314, section 3)


def teacher_bytes(stage: Training) -> float:
    """Bytes per weight of a stage's teacher while it runs."""
    bits = stage.teacher_bits if isinstance(stage, Distill) else None
    return bits / 8 if bits else 2 if stage.precision == "bf16" else 4


def _is_taught(stage: Training) -> bool:
    """Whether a second model computes beside the student while it is trained: a teacher, or a reference asked step by step."""
    return not isinstance(stage, Aligning) or (isinstance(stage, Dpo) and not stage.precompute)


def _is_own_reference(stage: Training) -> bool:
    """Whether the reference is the student without LoRA's updates."""
    return isinstance(stage, Dpo) and stage.lora is not None and stage.reference == "input"


def sequences(stage: Training) -> int:
    """Sequences per optimizer step; a pair of answers is two."""
    return stage.batch * (2 if isinstance(stage, Dpo) else 1)


def _budget(stage: Training, length: int) -> int | None:
    """Tokens of a stage, None for epochs, whose tokens are counted when the data are read."""
    if stage.tokens is not None:
        return stage.tokens
    return None if stage.steps is None else stage.steps * sequences(stage) * length


def adapted(config: PreTrainedConfig, counts: Counts, stage: Training, lora: Lora) -> tuple[int, float]:
    """Parameters that LoRA trains, and the bytes of the student with them: frozen weights in the stage's precision or in 4 bits."""
    from llamba.training.lora import targets  # here, so that other plans need not import the trainer

    with torch.device("meta"):
        student = family_of(config).causal_lm(config)
    shapes = {name: student.get_parameter(f"{name}.weight").shape for name in targets(student, "all")}
    trained = lora.rank * sum(sum(shapes[name]) for name in targets(student, stage.train))
    quantised = sum(shape.numel() for shape in shapes.values()) if lora.bits else 0
    frozen = (counts.student - quantised) * (2 if stage.precision == "bf16" else 4) + quantised * NF4_BITS / 8
    return trained, frozen + 4 * trained


def _memory(config: PreTrainedConfig, counts: Counts, stage: Training, trainable: int, length: int) -> dict[str, float]:
    """Bytes on one GPU beside the student: fp32 gradients and two moments of what is trained, the teacher, activations."""
    tokens = stage.micro_batch * (2 if isinstance(stage, Dpo) else 1) * length
    kept_per_layer = config.hidden_size if stage.gradient_checkpointing else 14 * config.hidden_size + 3 * config.intermediate_size
    logits = 5 * min(tokens * config.vocab_size, 2**26) * 4
    kept = (isinstance(stage, Distill) and stage.offline is not None) or _is_own_reference(stage)
    return {
        "gradients": 4 * trainable,
        "moments": 8 * trainable,
        "teacher": 0 if kept or not _is_taught(stage) else teacher_bytes(stage) * counts.teacher,
        "activations": 2 * tokens * kept_per_layer * config.num_hidden_layers + logits,
    }


def _flops_per_token(config: PreTrainedConfig, counts: Counts, stage: Training, trainable: int, length: int) -> float:
    """2 per weight and pass: teacher and student forward, activation gradients, weight gradients of what is trained; attention itself.

    Where layers are aligned one by one the head is left out, and of the student all but the converted layers.
    """
    head = config.vocab_size * config.hidden_size
    embedding = 0 if config.tie_word_embeddings else head
    attention = (
        2 * length * config.num_attention_heads * (config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads)
    )
    kept = sum(kind != RECURRENT for kind in config.layer_types)
    teacher = 2 * (counts.teacher - embedding) + attention * config.num_hidden_layers
    if isinstance(stage, (Matrix, Hidden)):
        converted = 1 - kept / config.num_hidden_layers
        student = stage.ahead * (counts.mixers + converted * counts.mlps) if _of_blocks(stage) else counts.mixers
        return teacher - 2 * head + 4 * student + 2 * trainable
    student = 2 * (counts.student - embedding) + attention * kept
    return teacher * _is_taught(stage) + student * (3 if stage.gradient_checkpointing else 2) + 2 * trainable


def _of_blocks(stage: Training) -> TypeGuard[Hidden]:
    return isinstance(stage, Hidden) and stage.target == "block"


@dataclass(frozen=True)
class Cost:
    """What a stage takes: parameters that are trained, bytes on one device by what they hold, floating-point operations for each token, and
    tokens (None: as many as the data have)."""

    trained: int
    memory: dict[str, float]
    per_token: float
    tokens: int | None

    @property
    def bytes(self) -> float:
        """Bytes on one device where nothing is sharded."""
        return sum(self.memory.values())

    def sharded(self, processes: int) -> float:
        """Bytes on each of so many devices where all but activations is sharded."""
        return self.memory["activations"] + (self.bytes - self.memory["activations"]) / processes

    def seconds(self, rate: float) -> float | None:
        """At so many floating-point operations per second; None where the tokens are not known."""
        return None if self.tokens is None else self.tokens * self.per_token / rate


def _taught(counts: Counts) -> int:
    """Parameters of a mixer's tensors that are the teacher's as a whole."""
    return sum(number for name, number in (counts.published | counts.own).items() if not is_new(f".self_attn.{name}"))


def cost(config: PreTrainedConfig, counts: Counts, stage: Training, length: int) -> Cost:
    """The cost of a stage on sequences of `length` tokens, by arithmetic alone."""
    new = counts.mixers - len(mixer_layers(config)) * _taught(counts)
    trained = {"mixers": counts.mixers, "new": new, "all": counts.student, "all_but_mlps": counts.student - counts.mlps}[stage.train]
    held = 4.0 * counts.student
    if isinstance(stage, Aligning) and stage.lora is not None:
        trained, held = adapted(config, counts, stage, stage.lora)
    memory = {"student": held} | _memory(config, counts, stage, trained, length)
    return Cost(trained, memory, _flops_per_token(config, counts, stage, trained, length), _budget(stage, length))
