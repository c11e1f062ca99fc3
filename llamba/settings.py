"""What a recipe is made of: data and stages, as frozen values that are checked against annotation and range when made.

`batch` counts sequences per optimizer step over all processes, `micro_batch` those in one forward pass of one process;
`warmup`, `save_every` and `log_every` count optimizer steps; a `warmup` below 1 is a part of all steps.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_type_hints

from llamba.typed import fits, name_of

Attention = float | list[int] | str


def require(condition: bool, key: str, needed: str, got: object) -> None:
    """Raises ValueError that names the key, what was needed and what was got, unless `condition`."""
    if not condition:
        raise ValueError(f"{key} must be {needed}, got {got!r}")


def check_types(value: Any, prefix: str) -> None:
    """Raises ValueError for the first field whose value does not fit its annotation."""
    hints = get_type_hints(type(value))
    for field in fields(value):
        got = getattr(value, field.name)
        require(fits(got, hints[field.name]), f"{prefix}.{field.name}", name_of(hints[field.name]), got)


def check_attention(attention: Attention, key: str) -> None:
    """Raises ValueError for a fraction outside 0 .. 1 and a list that is not of different layer indices."""
    if isinstance(attention, list):
        needed = "a list of different layer indices >= 0"
        require(all(layer >= 0 for layer in attention) and len(set(attention)) == len(attention), key, needed, attention)
    elif not isinstance(attention, str):
        require(0 <= attention <= 1, key, "a fraction from 0 to 1 or a list of layers", attention)


@dataclass(frozen=True)
class Data:
    """Rows to learn from: `.jsonl`, `.jsonl.gz` or `.parquet` files, folders of those, hub sets `org/name:split` (with a
    configuration `org/name@config:split`), or what a stage of the run made: `stage:pseudo_label`.

    A row is `{"messages": [...]}`, `{"text": "..."}` or a pair `{"prompt", "chosen", "rejected"}`, of which
    distillation reads prompt and chosen. Rows are cut at `length` tokens. `weights` gives each source's share of the
    tokens: rows are drawn in these shares, and a source that is used up starts again. `packing` puts several rows,
    which do not see each other, into one sequence of up to `length` tokens, and splits long texts instead of cutting
    them. `streaming` reads only as many rows as the stage trains on. `part` (3, 32) takes every 32nd training row of each
    source, from row 3 on. `template` replaces the tokenizer's chat template
    while tokenising: a file, or the name of one that the library brings (`llama3`). It is needed where the model's
    own does not mark the assistant's words with `{% generation %}`.
    """

    train: str | list[str]
    eval: str | list[str] | None = None
    length: int = 2048
    weights: list[float] | None = None
    packing: bool = False
    streaming: bool = False
    part: tuple[int, int] | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", tuple(self.part) if isinstance(self.part, list) else self.part)
        check_types(self, "data")
        require(bool(self.train), "data.train", "at least one source", self.train)
        require(self.length >= 2, "data.length", "at least 2 tokens", self.length)
        if self.weights is not None:
            sources = 1 if isinstance(self.train, str) else len(self.train)
            require(len(self.weights) == sources, "data.weights", f"one number for each of the {sources} sources", self.weights)
            require(all(0 < weight < math.inf for weight in self.weights), "data.weights", "numbers > 0", self.weights)
        if self.part is not None:
            require(0 <= self.part[0] < self.part[1], "data.part", "(k, n) with 0 <= k < n", self.part)
        if self.streaming and isinstance(self.train, list) and len(self.train) > 1 and self.weights is None:
            raise ValueError("data.weights must say how much to read of each source when data.streaming is true, got none")


@dataclass(frozen=True)
class Stage:
    """What every stage may say. `data` stands in for the recipe's. `attention`: before the stage, further layers are
    converted, so that this fraction, or these layers, keep attention. `skip` leaves the stage out, conversion and all.
    """

    name: ClassVar[str]

    data: Data | None = None
    attention: Attention | None = None
    skip: bool = False

    def __post_init__(self) -> None:
        check_types(self, self.name)
        if self.attention is not None:
            check_attention(self.attention, f"{self.name}.attention")

    def _positive(self, *keys: str) -> None:
        for key in keys:
            value = getattr(self, key)
            require(value is None or 0 < value < math.inf, f"{self.name}.{key}", "a number > 0", value)

    def _not_negative(self, *keys: str) -> None:
        for key in keys:
            require(0 <= getattr(self, key) < math.inf, f"{self.name}.{key}", "a number >= 0", getattr(self, key))


@dataclass(frozen=True)
class Training(Stage):
    """What every stage that trains may say.

    `train` names what is trained: the mixers of converted layers, everything, or everything but the MLPs. `lr` is the
    mixers' learning rate and `rest_lr` that of all else (default: the same). The length of the stage is `steps`
    (optimizer steps) or `tokens`, else `epochs`. The schedule `wsd` warms up, stays, and falls linearly over the last
    part `decay` of the steps; `floor` is the part of the learning rate at which `cosine` and `wsd` end.
    """

    train: Literal["mixers", "all", "all_but_mlps"] = "mixers"
    lr: float = 8e-5
    rest_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip: float = 0.1
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = 63
    decay: float = 0.1
    floor: float = 0.0
    batch: int = 64
    micro_batch: int = 1
    epochs: float = 1.0
    steps: int | None = None
    tokens: int | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    save_every: int = 500
    log_every: int = 10
    report_to: list[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas) if isinstance(self.betas, list) else self.betas)
        super().__post_init__()
        self._not_negative("weight_decay", "clip", "warmup")
        self._positive("lr", "rest_lr", "epochs", "batch", "micro_batch", "save_every", "log_every", "steps", "tokens")
        require(all(0 <= beta < 1 for beta in self.betas), f"{self.name}.betas", "two numbers in [0, 1)", self.betas)
        require(0 <= self.decay <= 1, f"{self.name}.decay", "a part from 0 to 1", self.decay)
        require(0 <= self.floor < 1, f"{self.name}.floor", "a part of lr from 0 to below 1", self.floor)
        if self.steps is not None and self.tokens is not None:
            raise ValueError(f"{self.name}: give steps or tokens, not both, got steps={self.steps} tokens={self.tokens}")


@dataclass(frozen=True)
class TokenTraining(Training):
    """A training stage on tokenised rows. `targets` says which tokens count: the assistant's, or all."""

    targets: Literal["assistant", "all"] = "assistant"


@dataclass(frozen=True)
class Distill(TokenTraining):
    """Distillation on logits: `kl` times a divergence from the teacher plus `ce` times cross-entropy, means over target tokens.

    `divergence` is KL(teacher || student), KL(student || teacher), or the generalised JSD with `beta` between them, at
    `temperature`. `reduction="batchmean_legacy"` is the published Mamba-in-Llama loss, whose divergence is a sum over all
    positions, per row. `teacher` stands in for the recipe's: another model of the same vocabulary, which may be larger;
    `teacher_bits` loads it quantised. `offline` runs the teacher once, before training, and keeps its so many likeliest
    tokens at each target, and the mass of the others; they lie in the run folder, or in `offline_folder`, where runs share them.
    """

    name: ClassVar[str] = "distill"

    teacher: str | None = None
    teacher_bits: Literal[4, 8] | None = None
    kl: float = 0.1
    ce: float = 1.0
    temperature: float = 1.0
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = 0.5
    reduction: Literal["token_mean", "batchmean_legacy"] = "token_mean"
    offline: int | None = None
    offline_folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._not_negative("kl", "ce")
        self._positive("temperature", "offline")
        require(self.kl + self.ce > 0, f"{self.name}.kl + {self.name}.ce", "greater than 0", self.kl + self.ce)
        require(0 < self.beta < 1, f"{self.name}.beta", "between 0 and 1 (its limits are forward_kl and reverse_kl)", self.beta)
        if self.offline and self.reduction != "token_mean":
            raise ValueError(
                f"{self.name}.offline keeps the teacher at target tokens and needs reduction='token_mean', got {self.reduction!r}"
            )
        if self.offline_folder and not self.offline:
            raise ValueError(f"{self.name}.offline_folder needs {self.name}.offline, the number of tokens to keep at each target; got none")


@dataclass(frozen=True)
class Matrix(TokenTraining):
    """Alignment of mixing matrices (MOHAWK, stage 1): the Frobenius distance of each head to the teacher's attention, for each layer
    fed with the teacher's hidden states, as a mean over sequences (weighted by their targets), heads and layers.

    What the matrix depends on is trained; that is part of the mixers, and `train` can name nothing else. `squared` takes the squared
    distance; only that may be estimated, without bias, from `rows` sampled rows instead of all. `teacher` stands in for the recipe's.
    With `weight_decay`, rows of in_proj that the matrix does not depend on decay too.
    """

    name: ClassVar[str] = "matrix"

    teacher: str | None = None
    squared: bool = False
    rows: int | None = None
    targets: Literal["assistant", "all"] = "all"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("rows")
        require(self.train == "mixers", "matrix.train", "'mixers'", self.train)
        if self.rows is not None and not self.squared:
            raise ValueError(f"matrix.rows needs matrix.squared=true: the root of an estimate is biased; got rows={self.rows}")


@dataclass(frozen=True)
class Hidden(TokenTraining):
    """Alignment of hidden states (MOHAWK, stage 2): the L2 distance to the teacher's after each converted layer fed with the teacher's
    hidden states, as a mean over target tokens and layers.

    `target` is the mixer's output, or the block's; `ahead` blocks in a row may run before the comparison. `train` other than `mixers`
    trains whole converted blocks and needs `target="block"`. `teacher` stands in for the recipe's.
    """

    name: ClassVar[str] = "hidden"

    teacher: str | None = None
    target: Literal["mixer", "block"] = "mixer"
    ahead: int = 1
    targets: Literal["assistant", "all"] = "all"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("ahead")
        if self.target != "block" and (self.ahead > 1 or self.train != "mixers"):
            raise ValueError(
                f"hidden.ahead > 1 and hidden.train other than 'mixers' need hidden.target='block'; got ahead={self.ahead}, "
                f"train={self.train!r} and target={self.target!r}"
            )


@dataclass(frozen=True)
class Select(Stage):
    """Measures which layers need attention and gives the student, which has mixers everywhere, the teacher's back in the best.

    `keep` is the part of layers that get attention, `method` how a layer is scored, `heads` whether heads are scored as
    well (see `llamba.select`). Scores are means over `rows` sequences of the data, `micro_batch` in one forward pass.
    Nothing is trained; the layers and their scores stand in `layers.json`, which `attention` accepts, and in a picture.
    """

    name: ClassVar[str] = "select"

    keep: float = 0.25
    method: Literal["restore", "swap"] = "restore"
    heads: bool = False
    rows: int = 64
    micro_batch: int = 1
    targets: Literal["assistant", "all"] = "assistant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("rows", "micro_batch")
        require(0 <= self.keep <= 1, "select.keep", "a fraction from 0 to 1", self.keep)


@dataclass(frozen=True)
class PseudoLabel(Stage):
    """The teacher answers the prompts of `data`; the student stays as it is. Later stages read `stage:pseudo_label`.

    A prompt is a row's conversation up to its last user turn, in which earlier answers stay the row's own; with
    `turns="all"` each user turn is asked in succession, and all answers are the teacher's. `rows` limits how many rows
    are read. `teacher` stands in for the recipe's. `engine` auto is vLLM where that is installed and there is one
    process and an accelerator, else transformers; `batch` counts prompts in one call. `temperature` 0 is greedy.
    Prompts of more than `max_prompt` tokens are skipped, as are those that leave no room for `max_new_tokens`.
    `unfinished` says what becomes of an answer that was cut off at that length: a student that learns from it learns to
    stop there.
    """

    name: ClassVar[str] = "pseudo_label"

    teacher: str | None = None
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    turns: Literal["last", "all"] = "last"
    rows: int | None = None
    batch: int = 16
    max_prompt: int | None = None
    max_new_tokens: int = 2048
    temperature: float = 0.6
    top_p: float = 0.9
    unfinished: Literal["drop", "keep"] = "drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("rows", "batch", "max_prompt", "max_new_tokens")
        self._not_negative("temperature")
        require(0 < self.top_p <= 1, f"{self.name}.top_p", "a number above 0, at most 1", self.top_p)


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
        if self.lora is not None and self.rest_lr is not None:
            raise ValueError(f"{self.name}: lora has one learning rate, got rest_lr={self.rest_lr} too; give one of the two")


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


@dataclass(frozen=True)
class Draft(TokenTraining):
    """A small model for speculative decoding, made from the teacher and trained; the student stays as it is.

    `layers`: how many of the teacher's layers it has, evenly spaced from the first to the last, or which ones. `head`: how many
    output tokens it has, the most frequent ones of the data's targets (default: all); it never proposes others. The loss is `kl`
    times KL(student || draft), over the tokens that it has, plus `ce` times cross-entropy, means over target tokens; Mamba-in-Llama
    trains its drafts by cross-entropy alone.
    """

    name: ClassVar[str] = "draft"

    train: Literal["mixers", "all", "all_but_mlps"] = "all"
    layers: int | list[int] = 2
    head: int | None = None
    kl: float = 1.0
    ce: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._not_negative("kl", "ce")
        self._positive("head")
        require(self.kl + self.ce > 0, f"{self.name}.kl + {self.name}.ce", "greater than 0", self.kl + self.ce)
        few = self.layers >= 1 if isinstance(self.layers, int) else bool(self.layers) and sorted(set(self.layers)) == self.layers
        require(few, f"{self.name}.layers", "a number >= 1, or a rising list of layer indices", self.layers)


STAGE_CONFIGS: dict[str, type[Stage]] = {kind.name: kind for kind in (Matrix, Hidden, Distill, Draft, PseudoLabel, Select, Sft, Dpo)}
