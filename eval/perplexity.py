"""Perplexity on plain text, and the distance to the teacher: what distillation is about, measured on text that nobody trained on.

Shapes: T tokens of a window, V vocabulary. A window starts with BOS where the tokenizer has one, and windows do not overlap.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamba.base.progress import progress
from llamba.chat.conversation import load
from llamba.eval import stats
from llamba.eval.scores import model_name, save, save_items, score

SLICE = 256  # positions whose log-probabilities [SLICE, V] are held at once, in fp32


@dataclass(frozen=True)
class Options:
    """What to measure. `windows` bounds how much of the text is read."""

    text: str
    teacher: str | None = None
    length: int = 1024
    windows: int | None = None
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.length < 2 or (self.windows is not None and self.windows < 1):
            raise ValueError(f"--length must be at least 2 and --windows at least 1, got {self.length} and {self.windows}")


@dataclass(frozen=True)
class Window:
    """One window: mean negative log-likelihood in nats, KL(teacher || student) in nats, and how often both choose the same token."""

    nll: float
    kl: float | None
    agreement: float | None


def windows_of(tokenizer: Any, text: str, length: int, most: int | None) -> list[list[int]]:
    """Full windows of `length` targets, each after BOS. Raises ValueError for a text shorter than one window."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = length if bos else length + 1
    made = [bos + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)][:most]
    if not made:
        raise ValueError(
            f"the text must have at least {step} tokens for one window, it has {len(ids)}; give more text or a smaller --length"
        )
    return made


@torch.inference_mode()
def measure(model: Any, teacher: Any | None, ids: list[int]) -> Window:
    """One window's numbers; logits [T, V] in slices, fp32."""
    tokens = torch.tensor([ids], device=model.device)
    logits = model(tokens, use_cache=False).logits[0, :-1]
    theirs = None if teacher is None else teacher(tokens.to(teacher.device), use_cache=False).logits[0, :-1]
    targets, sums = tokens[0, 1:], torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(targets), SLICE):
        part = slice(start, start + SLICE)
        own = logits[part].float().log_softmax(-1)
        sums[0] -= own.gather(1, targets[part, None]).double().sum().cpu()
        if theirs is not None:
            sums[1:] += _distance(own, theirs[part].to(own.device).float().log_softmax(-1))
    nll, kl, agreement = (sums / len(targets)).tolist()
    return Window(nll, *((None, None) if theirs is None else (kl, agreement)))


def _distance(own: Tensor, theirs: Tensor) -> Tensor:
    """Sums over positions of KL(theirs || own) and of equal choices; log-probabilities [T, V]."""
    kl = (theirs.exp() * (theirs - own)).sum()
    return torch.stack((kl, (own.argmax(-1) == theirs.argmax(-1)).sum())).double().cpu()


def run(name: str, out: Path, options: Options) -> str:
    """Measure a model on a text file; rows in scores.jsonl; returns the table.

    Raises ValueError for a teacher of another vocabulary, and for too little text.
    """
    model, tokenizer = load(name, options.dtype, options.device)
    teacher = None if options.teacher is None else load(options.teacher, options.dtype, options.device)[0]
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"--teacher must share the model's vocabulary of {model.config.vocab_size}, got {teacher.config.vocab_size}")
    path = Path(options.text)
    if not path.is_file():
        raise ValueError(f"--text must be a file of plain text, got {path}")
    text = path.read_text(encoding="utf-8")
    windows = windows_of(tokenizer, text, options.length, options.windows)
    found = [measure(model, teacher, ids) for ids in progress(windows, "perplexity", "windows")]
    nll = stats.bootstrap({i: [w.nll] for i, w in enumerate(found)})
    shown = model_name(name)
    more: dict[str, Any] = {"text": path.name, "length": options.length}
    perplexity = stats.Interval(math.exp(nll.mean), math.exp(nll.low), math.exp(nll.high), nll.n)
    rows = [score("perplexity", f"perplexity on {path.name}", shown, perplexity, **more)]
    if teacher is not None:
        kl = stats.bootstrap({i: [w.kl or 0.0] for i, w in enumerate(found)})
        same = stats.bootstrap({i: [100 * (w.agreement or 0.0)] for i, w in enumerate(found)})
        rows.append(score("perplexity", f"KL to the teacher on {path.name}", shown, kl, **more))
        rows.append(score("perplexity", f"same choice as the teacher on {path.name}, %", shown, same, **more))
    save(out, rows)
    same_text = f"{hashlib.sha256(text.encode()).hexdigest()[:8]}/{options.length}"  # windows of other texts are other questions
    save_items(out, "nll", shown, None, {f"{same_text}/{i}": [w.nll] for i, w in enumerate(found)})
    return "\n".join(f"{r['metric']:<48}{r['value']:10.4f}  [{r['low']:.4f}, {r['high']:.4f}]  {r['n']} windows" for r in rows)
