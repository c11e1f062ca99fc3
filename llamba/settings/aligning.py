"""The stages on TRL's trainers, sft and dpo, and LoRA."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from llamba.settings.common import Training, check_types, require


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of the projections of layers, in place of training these whole; merged into the weights at the end.

    `rank`, `alpha` (the update counts alpha / rank), `dropout` of its input. `bits=4` holds the frozen weights in NF4
    while training (QLoRA, arXiv 2305.14314; needs bitsandbytes).
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    bits: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "lora")
        require(self.rank > 0, "lora.rank", "a number > 0", self.rank)
        require(self.alpha > 0, "lora.alpha", "a number > 0", self.alpha)
        require(0 <= self.dropout < 1, "lora.dropout", "a number from 0 to below 1", self.dropout)
        require(self.bits in (None, 4), "lora.bits", "4 or none", self.bits)


@dataclass(frozen=True)
class Aligning(Training):
    """What the stages that run on TRL's trainers share: everything is trained, whole or through `lora`."""

    train: Literal["mixers", "all", "all_but_mlps"] = "all"
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    lora: Lora | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("rest_lr", "projection_lr", "join_lr"):
            if self.lora is not None and getattr(self, key) is not None:
                raise ValueError(f"{self.name}: lora has one learning rate, got {key}={getattr(self, key)} too; give one of the two")


@dataclass(frozen=True)
class Sft(Aligning):
    """Supervised fine-tuning on conversations (TRL's SFTTrainer): the mean cross-entropy over target tokens.

    `targets`: "answers" are the assistant's words and their end token, of answers that fit into the window whole: a
    longer conversation ends with the last such answer. "assistant" cuts at the window's end, and "all" learns the
    prompts too.
    """

    name: ClassVar[str] = "sft"

    targets: Literal["answers", "assistant", "all"] = "answers"
    lr: float = 2e-5
    warmup: float = 0.01


DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
    "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Dpo(Aligning):
    """Direct preference optimisation on pairs of answers (arXiv 2305.18290; TRL's DPOTrainer). `batch` counts pairs.

    `beta` holds the student to the reference. `loss`: one of `DPO_LOSSES` or several, whose sum is trained, with
    `loss_weights`. `label_smoothing` belongs to exo_pair and robust. `reference`: "input" is the student as the stage got
    it, "teacher" the recipe's teacher (Mamba-in-Llama, equation 4), anything else a model folder or hub name.
    `precompute`: the reference's log-probabilities are computed before training, and it leaves the memory.
    """

    name: ClassVar[str] = "dpo"
    targets: ClassVar[str] = "pairs"

    lr: float = 5e-7
    warmup: float = 0.1
    batch: int = 32
    beta: float = 0.1
    loss: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    label_smoothing: float = 0.0
    reference: str = "input"
    precompute: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("beta")
        require(bool(self.losses()), f"{self.name}.loss", "at least one loss", self.loss)
        for loss in self.losses():
            require(loss in DPO_LOSSES, f"{self.name}.loss", f"of {', '.join(DPO_LOSSES)}", loss)
        require(0 <= self.label_smoothing < 0.5, f"{self.name}.label_smoothing", "a number from 0 to below 0.5", self.label_smoothing)
        require(bool(self.reference), f"{self.name}.reference", "'input', 'teacher' or a model", self.reference)
        if self.loss_weights is not None:
            require(len(self.loss_weights) == len(self.losses()), f"{self.name}.loss_weights", "one number per loss", self.loss_weights)
        if "exo_pair" in self.losses() and not self.label_smoothing:
            raise ValueError(f"{self.name}.label_smoothing must be greater than 0 for exo_pair (its paper: 1e-3), got 0")

    def losses(self) -> list[str]:
        """The losses as a list."""
        return [self.loss] if isinstance(self.loss, str) else self.loss
