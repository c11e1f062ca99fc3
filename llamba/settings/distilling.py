"""The stages that learn from a teacher: matrix, hidden, distill, draft; and those that label and select."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from llamba.settings.common import Stage, TokenTraining, require


@dataclass(frozen=True)
class Distill(TokenTraining):
    """Distillation on logits: `kl` times a divergence from the teacher plus `ce` times cross-entropy, means over target tokens.

    `divergence` is KL(teacher || student), KL(student || teacher), or the generalised JSD with `beta` between them, at
    `temperature`. `reduction="batchmean_legacy"` is the published Mamba-in-Llama loss, whose divergence is a sum over all
    positions, per row. `teacher` stands in for the recipe's: another model of the same vocabulary, which may be larger;
    `teacher_bits` loads it quantised. `offline` runs the teacher once, before training, and keeps its so many likeliest
    tokens at each target, and the mass of the others; they lie in the run folder, or in `offline_folder`, where runs share them.
    `match="spans"` lets a teacher count other tokens: compared are then the likelihoods of spans of text that begin and end between
    tokens of both, at `span_temperature` (see `llamba.training.losses.spans`). Where both count the same tokens, these are compared.
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
    match: Literal["tokens", "spans"] = "tokens"
    span_temperature: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._not_negative("kl", "ce")
        self._positive("temperature", "offline", "span_temperature")
        require(self.kl + self.ce > 0, f"{self.name}.kl + {self.name}.ce", "greater than 0", self.kl + self.ce)
        require(0 < self.beta < 1, f"{self.name}.beta", "between 0 and 1 (its limits are forward_kl and reverse_kl)", self.beta)
        if self.offline and self.reduction != "token_mean":
            raise ValueError(
                f"{self.name}.offline keeps the teacher at target tokens and needs reduction='token_mean', got {self.reduction!r}"
            )
        if self.match == "spans" and (self.offline or self.reduction != "token_mean"):
            raise ValueError(
                f"{self.name}.match='spans' asks the teacher step by step and needs offline=none and reduction='token_mean', got "
                f"offline={self.offline} and reduction={self.reduction!r}"
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
        require(self.drop_window == 0, "matrix.drop_window", "0 (the matrix of a mixer has its window)", self.drop_window)
        if self.rows is not None and not self.squared:
            raise ValueError(f"matrix.rows needs matrix.squared=true: the root of an estimate is biased; got rows={self.rows}")


@dataclass(frozen=True)
class Hidden(TokenTraining):
    """Alignment of hidden states (MOHAWK, stage 2): the L2 distance to the teacher's after each converted layer fed with the teacher's
    hidden states, as a mean over target tokens and layers.

    `target` is the mixer's output, or the block's; `ahead` blocks in a row may run before the comparison. `train` other than `mixers` and
    `new` trains whole converted blocks and needs `target="block"`. `teacher` stands in for the recipe's.
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
        if self.target != "block" and (self.ahead > 1 or self.train not in ("mixers", "new")):
            raise ValueError(
                f"hidden.ahead > 1 and hidden.train other than 'mixers' and 'new' need hidden.target='block'; got ahead={self.ahead}, "
                f"train={self.train!r} and target={self.target!r}"
            )


@dataclass(frozen=True)
class Select(Stage):
    """Measures which layers need attention and gives the student, which has mixers everywhere, the teacher's back in the best.

    `keep` is the part of layers that get attention, `method` how a layer is scored, `heads` whether heads are scored as
    well, to look at: no student keeps part of a layer's heads (see `llamba.training.layer_ranking`). Scores are means over `rows`
    sequences of the data, `micro_batch` in one forward pass, at no more than `per_row` of a sequence's target tokens, evenly spaced (the
    layers see all of them, the head does not). Nothing is trained; the layers and their scores stand in
    `layers.json`, which `attention` accepts, and in a picture.
    """

    name: ClassVar[str] = "select"

    keep: float = 0.25
    method: Literal["restore", "swap"] = "restore"
    heads: bool = False
    rows: int = 64
    micro_batch: int = 1
    per_row: int | None = 128
    targets: Literal["assistant", "all"] = "assistant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("rows", "micro_batch", "per_row")
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
