"""Perplexity, and the distance to the teacher: what distillation is about, measured on text and chats that nobody trained on.

By position too, and with the recurrence off: what a window and the kept attention do alone.

Shapes: T tokens of a window, V vocabulary, n tokens of it that count.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamba.base.folders import resolve_model
from llamba.base.progress import progress
from llamba.chat.conversation import load
from llamba.eval import stats
from llamba.eval.recurrence import switched
from llamba.eval.scores import model_name, save, save_items, score
from llamba.eval.texts import Text, chats, plain, windows_of
from llamba.models.loading import require_same_vocabulary
from llamba.models.mixers import without_recurrence

__all__ = ["Options", "Window", "measure", "run", "windows_of"]
SLICE = 256  # positions whose log-probabilities [SLICE, V] are held at once, in fp32
OFF = ", recurrence off"
LOW = ", 8-bit weights"


@dataclass(frozen=True)
class Options:
    """What to measure. `windows` bounds how much of the text is read; `positions` are where ranges of positions end.
    `bits` 8 measures the model, not the teacher, with 8-bit weights.
    """

    text: str | None = None
    teacher: str | None = None
    length: int = 1024
    windows: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    chat: str | None = None
    recurrence: str = "on"
    positions: tuple[int, ...] = (256,)
    bits: int | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.chat is None):
            raise ValueError("what to measure on must be said by --text FILE or by --chat DATA, one of them")
        if self.length < 2 or (self.windows is not None and self.windows < 1):
            raise ValueError(f"--length must be at least 2 and --windows at least 1, got {self.length} and {self.windows}")
        if any(edge < 1 for edge in self.positions) or list(self.positions) != sorted(set(self.positions)):
            raise ValueError(f"--positions must be rising numbers of at least 1, got {' '.join(map(str, self.positions))}")

    @property
    def name(self) -> str:
        """What the measurements are called after."""
        return Path(self.text).name if self.text is not None else f"answers of {Path(str(self.chat)).name}"


@dataclass(frozen=True)
class Window:
    """One window's tokens that count [n]: position (1 is the second token), negative log-likelihood and KL(teacher || student) in nats,
    and 1 where both choose the same token; the latter two are empty without a teacher."""

    positions: list[int]
    nll: list[float]
    kl: list[float]
    same: list[float]


@torch.inference_mode()
def measure(model: Any, teacher: Any | None, text: Text) -> Window:
    """One window's numbers; logits [n, V] in slices, fp32."""
    tokens = torch.tensor([text.ids], device=model.device)
    where = torch.tensor(text.targets, device=model.device)
    logits = model(tokens[:, :-1], use_cache=False).logits[0]
    theirs = None if teacher is None else teacher(tokens[:, :-1].to(teacher.device), use_cache=False).logits[0]
    nll, kl, same = list[float](), list[float](), list[float]()
    for part in where.split(SLICE):
        own = logits[part - 1].float().log_softmax(-1)
        nll += (-own.gather(1, tokens[0, part, None])[:, 0]).tolist()
        if theirs is not None:
            distance, alike = _distance(own, theirs[(part - 1).to(theirs.device)].to(own.device).float().log_softmax(-1))
            kl, same = kl + distance.tolist(), same + alike.tolist()
    return Window(text.targets, nll, kl, same)


def _distance(own: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """KL(theirs || own) and equal choices at each position [n]; log-probabilities [n, V]."""
    return (theirs.exp() * (theirs - own)).sum(-1), (own.argmax(-1) == theirs.argmax(-1)).float()


def run(name: str, out: Path, options: Options) -> str:
    """Measure a model on a text or on chats; rows in scores.jsonl; returns the table.

    Raises ValueError for a teacher of another vocabulary, for too little text, for no text, and for a window beyond the model's context.
    """
    model, tokenizer = load(name, options.dtype, options.device, options.bits)
    conditions = switched(model, options.recurrence)
    teacher = _teacher(name, model, options)
    texts, note = _read(tokenizer, options)
    note += _beyond(texts, {"the model": model} | ({} if teacher is None else {"the teacher": teacher}))
    found = {}
    for off in conditions:
        with without_recurrence(model) if off else nullcontext():
            shown = progress(texts, f"perplexity{OFF if off else ''}", "chats" if options.chat else "windows")
            found[OFF if off else ""] = [measure(model, teacher, text) for text in shown]
    return _report(found, texts, model_name(name), out, options, note)


def _teacher(name: str, model: Any, options: Options) -> Any | None:
    if options.teacher is None:
        return None
    teacher = load(options.teacher, options.dtype, options.device)[0]
    if teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"--teacher must share the model's vocabulary of {model.config.vocab_size}, got {teacher.config.vocab_size}")
    require_same_vocabulary(resolve_model(name), resolve_model(options.teacher))
    return teacher


def _beyond(texts: Sequence[Text], models: dict[str, Any]) -> str:
    """A line for each model whose context is shorter than what it reads."""
    longest = max(len(text.ids) for text in texts) - 1
    contexts = {which: read.config.max_position_embeddings for which, read in models.items()}
    return "".join(f"\n{which} was made for {most} tokens, and reads {longest}" for which, most in contexts.items() if longest > most)


def _read(tokenizer: Any, options: Options) -> tuple[list[Text], str]:
    if options.text is not None:
        return plain(tokenizer, Path(options.text), options.length, options.windows), ""
    assert options.chat is not None
    return chats(tokenizer, options.chat, options.length, options.windows)


def _ranges(texts: Sequence[Text], edges: Sequence[int]) -> list[tuple[str, range]]:
    """All positions, and ranges of them between edges, named; those alone that texts have."""
    last = max(max(text.targets) for text in texts)
    edges = [edge for edge in edges if edge < last]
    between = [(f", positions {low + 1} to {high}", range(low + 1, high + 1)) for low, high in pairwise([0, *edges])]
    return [("", range(last + 1)), *between, *((f", after position {edge}", range(edge + 1, last + 1)) for edge in edges[-1:])]


def _values(windows: Sequence[Window], key: str, inside: range) -> dict[int, list[float]]:
    """Window -> its values at positions of a range."""
    found = {
        i: [value for position, value in zip(w.positions, getattr(w, key), strict=True) if position in inside]
        for i, w in enumerate(windows)
    }
    return {i: values for i, values in found.items() if values}


def _report(found: dict[str, list[Window]], texts: Sequence[Text], model: str, out: Path, options: Options, note: str) -> str:
    """Rows and items kept; the table."""
    rows, more = list[dict[str, Any]](), dict[str, Any](text=options.name, length=options.length)
    for suffix, windows in found.items():
        for where, inside in _ranges(texts, options.positions):
            tail = f" on {options.name}{where}{suffix}{LOW if options.bits else ''}"
            if not (nll := _values(windows, "nll", inside)):
                continue
            mean = stats.bootstrap(nll)
            perplexity = stats.Interval(math.exp(mean.mean), math.exp(mean.low), math.exp(mean.high), mean.n)
            rows.append(score("perplexity", f"perplexity{tail}", model, perplexity, **more))
            if options.teacher is not None:
                kl, same = _values(windows, "kl", inside), _values(windows, "same", inside)
                rows.append(score("perplexity", f"KL to the teacher{tail}", model, stats.bootstrap(kl), **more))
                same = {i: [100 * value for value in values] for i, values in same.items()}
                rows.append(score("perplexity", f"same choice as the teacher{tail}, %", model, stats.bootstrap(same), **more))
        # windows of other texts are other questions
        content = hashlib.sha256(json.dumps([text.ids for text in texts]).encode()).hexdigest()[:8]
        means = {f"{content}/{i}": [sum(w.nll) / len(w.nll)] for i, w in enumerate(windows)}
        save_items(out, f"nll{suffix}{LOW if options.bits else ''}", model, None, means)
    save(out, rows)
    unit, wide = "chats" if options.chat else "windows", max(len(row["metric"]) for row in rows) + 2
    lines = [f"{r['metric']:<{wide}}{r['value']:10.4f}  [{r['low']:.4f}, {r['high']:.4f}]  {r['n']} {unit}" for r in rows]
    return "\n".join([*([note] if note else []), *lines, *_worth(found, texts, options)])


def _worth(found: dict[str, list[Window]], texts: Sequence[Text], options: Options) -> list[str]:
    """What the recurrence changes, window by window, where both were measured."""
    if len(found) < 2:
        return []
    key, named = ("kl", "KL") if options.teacher is not None else ("nll", "nats per token")
    lines = []
    for where, inside in _ranges(texts, options.positions):
        on, off = (_values(found[suffix], key, inside) for suffix in ("", OFF))
        if on:
            change = stats.paired(on, off)
            gap = change.difference
            by = f"{gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
            lines.append(f"the recurrence changes {named}{where} by {by}, for the better on {change.worse} of {gap.n}")
    return lines
