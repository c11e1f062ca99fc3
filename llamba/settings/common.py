"""What all stages may say: data, how long and how to train; and the checks of values. See `llamba.settings`."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_type_hints

from llamba.settings.typed import fits, name_of

Attention = float | list[int] | str
Option = bool | int | float | str | None  # of a mixer


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
    them. `streaming` reads only as many rows as the stage trains on, from the row on where an earlier stage of the run
    stopped reading the same source (at its end, from the first row again). `part` (3, 32) takes every 32nd training row of each
    source, from row 3 on. `template` is the chat template while
    tokenising: `auto` takes the tokenizer's own if it marks the assistant's words with `{% generation %}`, else the one of
    the library that writes the same and marks them; or the name of one (`llama3`, `chatml`, `qwen3`, ...), or a file; None is
    the tokenizer's own.
    """

    train: str | list[str]
    eval: str | list[str] | None = None
    length: int = 2048
    weights: list[float] | None = None
    packing: bool = False
    streaming: bool = False
    part: tuple[int, int] | None = None
    template: str | None = "auto"

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


def sources_at_hand(data: Data) -> Data | None:
    """The data's sources that no stage of a run makes, to be read only as far as needed; None where there are none."""
    every = [data.train] if isinstance(data.train, str) else data.train
    places = [place for place, source in enumerate(every) if not source.startswith("stage:")]
    if not places:
        return None
    weights = [1.0 if data.weights is None else data.weights[place] for place in places]
    return replace(data, train=[every[place] for place in places], eval=None, weights=weights, packing=False, streaming=True)


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

    `train` names what is trained: the mixers of converted layers, what is new in them (all but the teacher's own rows and matrices: what a
    window sees stays attention), everything, or everything but the MLPs. `lr` is the mixers' learning rate, `projection_lr` that of their
    input and output projections, which hold what the teacher knew (of `new`: of in_proj's other rows), `join_lr` that of the weights by
    which the recurrence counts beside a window (behind its gate, `rest_bias`), and `rest_lr` that of all else (default of the three: `lr`).
    The length of the stage is `steps` (optimizer steps) or `tokens`, else `epochs`. The schedule `wsd` warms up, stays, and falls linearly
    over the last part `decay` of the steps; `floor` is the part of the learning rate at which `cosine` and `wsd` end.
    """

    train: Literal["mixers", "new", "all", "all_but_mlps"] = "mixers"
    lr: float = 8e-5
    projection_lr: float | None = None
    join_lr: float | None = None
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
        self._positive("lr", "projection_lr", "join_lr", "rest_lr", "epochs", "batch", "micro_batch", "save_every", "log_every", "steps")
        self._positive("tokens")
        for key, largest in (("steps", 10**9), ("tokens", 10**15), ("batch", 10**7), ("micro_batch", 10**7), ("epochs", 10**6)):
            value = getattr(self, key)
            require(value is None or value <= largest, f"{self.name}.{key}", f"at most {largest:,}", value)
        require(all(0 <= beta < 1 for beta in self.betas), f"{self.name}.betas", "two numbers in [0, 1)", self.betas)
        require(0 <= self.decay <= 1, f"{self.name}.decay", "a part from 0 to 1", self.decay)
        require(0 <= self.floor < 1, f"{self.name}.floor", "a part of lr from 0 to below 1", self.floor)
        if self.train == "new" and self.weight_decay:
            raise ValueError(
                f"{self.name}.train='new' leaves the teacher's rows of in_proj as they are, which weight decay would not; "
                f"needs {self.name}.weight_decay=0, got {self.weight_decay}"
            )
        if self.steps is not None and self.tokens is not None:
            raise ValueError(f"{self.name}: give steps or tokens, not both, got steps={self.steps} tokens={self.tokens}")


@dataclass(frozen=True)
class TokenTraining(Training):
    """A training stage on tokenised rows. `targets` says which tokens count: the assistant's, or all.

    `drop_window` is the share of rows for which the mixers' windows and sinks see nothing: they have what stands for the rest alone.
    """

    targets: Literal["assistant", "all"] = "assistant"
    drop_window: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.drop_window <= 1, f"{self.name}.drop_window", "a share from 0 to 1", self.drop_window)
