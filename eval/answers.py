"""A model's answers to a benchmark's questions: its own chat template, batched, resumable, the same on every rerun.

Shapes: B rows of a batch, T tokens, V vocabulary. Batches are fixed by the order of the questions, so that a rerun repeats whole
batches. A row's randomness depends on its own seed and position alone, not on its neighbours, nor on speculation.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from llamba.eval.journal import Journal, write_lines
from llamba.eval.judge import digest
from llamba.folders import resolve_model

Message = dict[str, str]
_SAMPLED = 64  # slices of a weight file that enter its fingerprint


@dataclass(frozen=True)
class Settings:
    """How answers are made. `draft` names a smaller model that speculates (one row at a time; the answers stay the same)."""

    batch: int = 8
    max_new_tokens: int = 1024
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    draft: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.max_new_tokens < 1:
            raise ValueError(f"--batch and --max-new-tokens must be at least 1, got {self.batch} and {self.max_new_tokens}")

    @property
    def rows(self) -> int:
        """Rows per batch."""
        return 1 if self.draft else self.batch


@dataclass(frozen=True)
class Question:
    """Turns of a user, answered one after the other at a temperature (0: greedy); `seed` makes its draws its own."""

    id: int | str
    turns: tuple[str, ...]
    temperature: float
    seed: str = ""


@dataclass(frozen=True)
class Answered:
    """One answer. `stopped`: "end" (the model ended it), "length" (max_new_tokens), "context" (no room; the text may be empty)."""

    text: str
    tokens: int
    stopped: str


class Gumbel(LogitsProcessor):
    """Turns greedy choice into sampling: scores / temperature + Gumbel noise (Gumbel-max trick), noise from (seed, position).

    scores [B, V]. Rows at temperature 0 stay greedy. `width`: prompt tokens of the batch.
    """

    def __init__(self, temperatures: Sequence[float], seeds: Sequence[str], width: int) -> None:
        self.temperatures, self.seeds, self.width = temperatures, seeds, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        scores = scores.float().clone()
        for row, temperature in enumerate(self.temperatures):
            if temperature > 0:
                scores[row] = scores[row] / temperature + self._noise(row, input_ids.shape[1] - self.width, scores)
        return scores

    def _noise(self, row: int, position: int, scores: Tensor) -> Tensor:
        seed = hashlib.sha256(f"{self.seeds[row]}/{position}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:8]) >> 1)
        uniform = torch.rand(scores.shape[-1], generator=generator, dtype=torch.float64).clamp_min(1e-300)
        return -torch.log(-torch.log(uniform)).to(scores)


class Room(StoppingCriteria):
    """Stops each row where its own context is full. `limits` [B]: new tokens that fit."""

    def __init__(self, limits: Tensor, width: int) -> None:
        self.limits, self.width = limits, width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return (input_ids.shape[1] - self.width >= self.limits).to(input_ids.device)


class Answerer:
    """A loaded model that answers batches. Raises ValueError for a tokenizer without a chat template, or a draft of another vocabulary."""

    def __init__(self, name: str, settings: Settings) -> None:
        from llamba.chat import load

        self.settings = settings
        self.model, self.tokenizer = load(name, settings.dtype, settings.device)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{name} needs a tokenizer with a chat template to be asked questions; its tokenizer has none")
        self.draft = load(settings.draft, settings.dtype, str(self.model.device))[0] if settings.draft else None
        if self.draft is not None and self.draft.config.vocab_size != self.model.config.vocab_size:
            raise ValueError(
                f"--draft must share the model's vocabulary of {self.model.config.vocab_size}, got {self.draft.config.vocab_size}"
            )
        self.context = self.model.config.max_position_embeddings

    def template(self) -> str:
        """Hash of the chat template."""
        return digest(self.tokenizer.chat_template)[:16]

    def __call__(
        self, chats: Sequence[list[Message]], temperatures: Sequence[float], seeds: Sequence[str], max_new_tokens: int | None = None
    ) -> list[Answered]:
        """The next assistant message of each chat; a chat that does not fit the context gets an empty one."""
        system = [] if self.settings.system is None else [{"role": "system", "content": self.settings.system}]
        texts = [self.tokenizer.apply_chat_template(system + chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        lengths = [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        fits = [row for row, length in enumerate(lengths) if length < self.context]
        made = [Answered("", 0, "context")] * len(chats)
        if fits:
            new = self._generate([texts[r] for r in fits], [temperatures[r] for r in fits], [seeds[r] for r in fits], max_new_tokens)
            for row, answer in zip(fits, new, strict=True):
                made[row] = answer
        return made

    @torch.inference_mode()
    def _generate(self, texts: list[str], temperatures: list[float], seeds: list[str], most: int | None) -> list[Answered]:
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        batch = self.tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True).to(self.model.device)
        width = batch["input_ids"].shape[1]
        room = self.context - batch["attention_mask"].sum(1)  # [B]
        wanted = most or self.settings.max_new_tokens
        ends = self._ends()
        out = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=GenerationConfig(
                max_new_tokens=min(wanted, int(room.max())), do_sample=False, pad_token_id=pad, eos_token_id=ends
            ),
            logits_processor=LogitsProcessorList([Gumbel(temperatures, seeds, width)] if any(temperatures) else []),
            stopping_criteria=StoppingCriteriaList([Room(room, width)]),
            **({} if self.draft is None else {"assistant_model": self.draft}),
        )[:, width:]
        return [self._read(ids.tolist()[: int(left)], set(ends), wanted) for ids, left in zip(out, room, strict=True)]

    def _ends(self) -> list[int]:
        own = self.model.generation_config.eos_token_id
        listed = [] if own is None else [own] if isinstance(own, int) else list(own)
        return sorted({*listed, self.tokenizer.eos_token_id} - {None})

    def _read(self, ids: list[int], ends: set[int], wanted: int) -> Answered:
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
        stopped = "end" if end is not None else "length" if len(ids) >= wanted else "context"
        return Answered(text, len(ids) if end is None else end, stopped)


def fingerprint(name: str) -> str:
    """What a model's weights and config are, as a hash: files of a folder (sampled), or name and revision on the hub."""
    path = Path(resolve_model(name))
    if not path.is_dir():
        return digest([str(path), AutoConfig.from_pretrained(str(path))._commit_hash])[:16]
    found = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin")):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for slice_ in range(_SAMPLED):
                opened.seek(slice_ * size // _SAMPLED)
                found.update(opened.read(4096))
    return found.hexdigest()[:16]


def _converse(answerer: Answerer, questions: Sequence[Question], say: Callable[[str], str]) -> list[list[Answered]]:
    """Answers [B][turns] of questions that have equally many turns or fewer; each turn of all questions is one batch."""
    chats: list[list[Message]] = [[] for _ in questions]
    answers: list[list[Answered]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        rows = [row for row, question in enumerate(questions) if turn < len(question.turns)]
        for row in rows:
            chats[row].append({"role": "user", "content": say(questions[row].turns[turn])})
        asked = [questions[row] for row in rows]
        seeds = [f"{answerer.settings.seed}/{q.seed or q.id}/{turn}" for q in asked]
        made = answerer([chats[row] for row in rows], [q.temperature for q in asked], seeds)
        for row, answer in zip(rows, made, strict=True):
            chats[row].append({"role": "assistant", "content": answer.text})
            answers[row].append(answer)
    return answers


def answer_all(name: str, model_id: str, questions: Sequence[Question], settings: Settings, path: Path) -> list[dict[str, Any]]:
    """Answers to all questions, in FastChat's format, in `path`; those that stand there already are not made again.

    Raises ValueError where the file holds answers of another model or made with other settings, and OSError on a full disk.
    """
    made_by = {"model": fingerprint(name), "settings": _relevant(settings)}
    with Journal(path) as journal:
        if other := next((row for row in journal.rows if row.get("made_by") != made_by), None):
            raise ValueError(
                f"{path} holds answers of another model or other settings ({other.get('made_by')}, now {made_by}); "
                "choose another --out, or delete the file"
            )
        have = {row["question_id"]: row for row in journal.rows}
        batches = [questions[i : i + settings.rows] for i in range(0, len(questions), settings.rows)]
        todo = [batch for batch in batches if any(question.id not in have for question in batch)]
        answerer = Answerer(name, settings) if todo else None
        for batch in tqdm(todo, desc=f"answers {model_id}", unit="batch", disable=None):
            assert answerer is not None
            for question, answers in zip(batch, _converse(answerer, batch, str), strict=True):
                row = _row(question, answers, model_id, made_by, answerer.template())
                if question.id not in have:
                    _keep(journal, row)
                have[question.id] = row
        rows = [have[question.id] for question in questions]
    write_lines(path, rows)
    return rows


def _keep(journal: Journal, row: dict[str, Any]) -> None:
    try:
        journal.append(row)
    except OSError as error:
        raise ValueError(f"{journal.path} cannot be written ({error}); the answers so far are kept: make room and run again") from error


def _relevant(settings: Settings) -> dict[str, Any]:
    """What the answers depend on: not the device, nor the draft, but the batch, for the last bits of its sums."""
    return {"batch": settings.rows, "max_new_tokens": settings.max_new_tokens, "seed": settings.seed, "dtype": settings.dtype,
            "system": settings.system}  # fmt: skip


def _row(question: Question, answers: list[Answered], model_id: str, made_by: dict[str, Any], template: str) -> dict[str, Any]:
    turns = [answer.text for answer in answers]
    return {
        "question_id": question.id,
        "answer_id": digest([question.id, made_by, turns])[:22],
        "model_id": model_id,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
        "made_by": made_by,
        "template": template,
        "temperature": question.temperature,
        "tokens": [answer.tokens for answer in answers],
        "stopped": [answer.stopped for answer in answers],
    }


def say_what_stopped(rows: Sequence[dict[str, Any]]) -> str | None:
    """A sentence about answers that were cut, or None."""
    kinds = [kind for row in rows for kind in row["stopped"]]
    cut = {kind: kinds.count(kind) for kind in ("length", "context")}
    if not any(cut.values()):
        return None
    share = math.ceil(100 * sum(cut.values()) / len(kinds))
    return f"{cut['length']} answers were cut at max_new_tokens and {cut['context']} at the end of the context ({share}% of {len(kinds)})"
