"""The teacher answers prompts; the result is a data folder of conversations (Mamba-in-Llama, section 5: the student learns from these).

    out/parts/   while the stage runs: one file per batch of prompts, which appears whole or not at all
    out/rows/    rows-00000.jsonl ... of {"messages", "source"}, in the order of the prompts; manifest.json

Prompts are sorted by length within windows and answered in batches, each with a seed of its own. A batch's answers depend on the prompts
and its number alone, so a run that was killed repeats what it had not finished, and several processes share the batches: batch k is
process k mod processes' own.
"""

import functools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llamba.base.folders import ROWS
from llamba.base.foreign import read_object
from llamba.chat.conversation import Sampling
from llamba.chat.engines import ENGINES, Engine, choose_engine
from llamba.data import sources
from llamba.data.tokens import StageData
from llamba.models.loading import ends_of, load_config, load_tokenizer, located
from llamba.settings import PseudoLabel
from llamba.stages.prompts import WINDOW, Messages, Prompt, Reader, batches, source_names

_PATIENCE = 6 * 3600  # seconds without a new batch from the other processes


@dataclass
class Talk:
    """A prompt's conversation so far, which ends with an answer, and why it ended before its last turn."""

    prompt: Prompt
    messages: Messages = field(default_factory=list)
    tokens: int = 0
    ended: str | None = None

    def line(self) -> dict[str, Any]:
        """As a line of a part file. Without any answer there are no messages."""
        return {
            "index": self.prompt.index,
            "source": self.prompt.source,
            "messages": self.messages,
            "tokens": self.tokens,
            "ended": self.ended,
        }


class Answerer:
    """Batches of prompts to conversations."""

    def __init__(self, stage: PseudoLabel, reader: Reader, start: Callable[[], Engine], seed: int) -> None:
        self.stage, self.reader, self.seed = stage, reader, seed
        self.engine = functools.cache(start)  # loads the model for the first batch: a rerun with nothing left to answer loads none

    def _ask(self, talks: list[Talk], turn: int) -> list[tuple[Talk, Messages, list[int]]]:
        """The talks that have such a turn and room for it, with the conversation to be answered and its ids."""
        asked = []
        for talk in talks:
            if talk.ended is None and turn < len(talk.prompt.turns):
                messages = talk.messages + talk.prompt.turns[turn]
                ids = self.reader.ids(talk.prompt.source, messages)
                if len(ids) > self.reader.room:
                    talk.ended = "too_long"
                else:
                    asked.append((talk, messages, ids))
        return asked

    def __call__(self, number: int, batch: list[Prompt]) -> list[Talk]:
        """The talks of batch `number`, whole or ended early: an answer that was cut off (unless those are kept) or empty is left out."""
        talks = [Talk(prompt) for prompt in batch]
        for turn in range(max(len(prompt.turns) for prompt in batch)):
            if not (asked := self._ask(talks, turn)):
                break
            seed = int(np.random.SeedSequence((self.seed, number, turn)).generate_state(1)[0]) // 2
            answers = self.engine()([ids for _, _, ids in asked], seed)
            for (talk, messages, _), answer in zip(asked, answers, strict=True):
                text = self.reader.tokenizer.decode(answer.ids, skip_special_tokens=True)
                if not answer.finished and self.stage.unfinished == "drop":
                    talk.ended = "unfinished"
                elif not text.strip():
                    talk.ended = "empty_answer"
                else:
                    talk.messages = [*messages, {"role": "assistant", "content": text}]
                    talk.tokens += len(answer.ids)
        return talks


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _begin(out: Path, facts: dict[str, Any]) -> None:
    """Note what the answers rest on. Raises ValueError where those that `out` holds rest on something else."""
    path = out / "begun.json"
    out.mkdir(parents=True, exist_ok=True)
    old = read_object(path) if path.exists() else facts
    for key in facts:
        if old[key] != facts[key]:
            raise ValueError(f"{out} holds answers that began with other {key}; restore them ({old[key]}), or delete the folder")
    _write(path, json.dumps(facts, indent=2) + "\n")


def _wait_for(parts: list[Path]) -> None:
    """Until every process has left its parts. Raises ValueError where none has appeared for hours."""
    left, since = len(parts), time.monotonic()
    while missing := sum(not part.exists() for part in parts):
        if missing != left:
            left, since = missing, time.monotonic()
        if time.monotonic() - since > _PATIENCE:
            raise ValueError(f"waited {_PATIENCE // 3600} hours for {missing} batches of the other processes; run the same command again")
        time.sleep(0.2)


def _join(out: Path, parts: list[Path]) -> dict[str, int]:
    """The parts as files of rows, in the order of the prompts, in `rows.partial`; returns the counts."""
    partial = out / f"{ROWS}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    counts = Counter({"rows": 0, "answer_tokens": 0, "shortened": 0, "unfinished": 0, "empty_answer": 0})
    for number, start in enumerate(range(0, len(parts), WINDOW)):
        lines = [line for part in parts[start : start + WINDOW] for line in _read_lines(part)]
        talks = sorted((line for line in lines if line["messages"]), key=lambda line: line["index"])
        _write_lines(partial / f"rows-{number:05}.jsonl", [{"messages": talk["messages"], "source": talk["source"]} for talk in talks])
        counts.update(line["ended"] for line in lines if not line["messages"])
        counts["rows"] += len(talks)
        counts["shortened"] += sum(talk["ended"] is not None for talk in talks)
        counts["answer_tokens"] += sum(talk["tokens"] for talk in talks)
    return dict(counts)


def _finish(out: Path, parts: list[Path], manifest: dict[str, Any], skipped: dict[str, int]) -> None:
    """Leave `rows`, whole, with its manifest. Raises ValueError where no row is left."""
    counts = {**skipped, **_join(out, parts)}
    print("pseudo_label: " + ", ".join(f"{number:,} {name}" for name, number in counts.items()), flush=True)
    if not counts["rows"]:
        raise ValueError(f"no prompt was answered: {counts}; see stages.pseudo_label.max_new_tokens and .unfinished, and the data")
    _write(out / f"{ROWS}.partial" / "manifest.json", json.dumps({**manifest, "counts": counts}, indent=2) + "\n")
    os.replace(out / f"{ROWS}.partial", out / ROWS)


def _ends(teacher: str, config: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of the teacher's generation settings, and the tokenizer's end."""
    found = [token for token in dict.fromkeys([*ends_of(teacher, config), tokenizer.eos_token_id]) if token is not None]
    if not found:
        raise ValueError(f"{teacher} must say which token ends an answer (eos_token_id), and does not")
    return found


def _room(stage: PseudoLabel, context: int) -> int:
    room = min(context - stage.max_new_tokens, stage.max_prompt or context)
    if room < 1:
        raise ValueError(
            f"pseudo_label.max_new_tokens must leave room for a prompt in the teacher's {context} tokens, got {stage.max_new_tokens}"
        )
    return room


def _answer_all(stage: PseudoLabel, reader: Reader, answer: Answerer, out: Path) -> list[Path]:
    """Answer this process's batches that are not answered yet; returns the parts of all processes."""
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    parts, started, tokens, prompts = [], time.monotonic(), 0, 0
    (out / "parts").mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(batches(iter(reader), stage.batch)):
        part = out / "parts" / f"{number:07}.jsonl"
        parts.append(part)
        if number % processes == rank and not part.exists() and not (out / ROWS).exists():
            talks = answer(number, batch)
            tokens, prompts = tokens + sum(talk.tokens for talk in talks), prompts + len(talks)
            _write_lines(part, [talk.line() for talk in talks])
            if rank == 0:
                spent = time.monotonic() - started
                each = f"{prompts:,} prompts answered, {tokens / spent:,.0f} answer tokens/s"
                print(f"pseudo_label: batch {number + 1}, {each} per process, {spent:,.0f} s", flush=True)
    return parts


def run(stage: PseudoLabel, student: str, teacher: str, data: StageData, out: Path) -> dict[str, float]:
    """Let `teacher` (or the stage's own) answer the prompts of the stage's data; leaves `out/rows`. The student is not touched.

    Returns the counts: rows, skipped prompts and dropped answers by reason, answer tokens. Raises ValueError for rows without
    messages, messages that the chat template refuses, data that changed under a stopped run, and where no answer is left.
    """
    if data.config.weights is not None:
        raise ValueError("pseudo_label reads every row once, so data.weights has no meaning; set stages.pseudo_label.data.weights=none")
    name, engine = located(stage.teacher or teacher), choose_engine(stage.engine)
    config, tokenizer = load_config(name), load_tokenizer(name)
    ends, sampling = _ends(name, config, tokenizer), Sampling(stage.max_new_tokens, stage.temperature, stage.top_p, data.seed)
    reader = Reader(stage, data.config, tokenizer, _room(stage, config.max_position_embeddings))
    first = int(os.environ.get("RANK", "0")) == 0
    digests = {str(path): sources.sha256(path) for source in source_names(data.config) for path in sources.files(source)} if first else {}
    if first:
        _begin(out, {"engine": engine, "files": digests})
    if not (out / ROWS).exists():
        answer = Answerer(stage, reader, lambda: ENGINES[engine](name, sampling, ends), data.seed)
        parts = _answer_all(stage, reader, answer, out)
        if first:
            _wait_for(parts)
            licences = {source: sources.licence(source) for source in source_names(data.config)}
            facts = {"teacher": name, "engine": engine, "sampling": asdict(sampling), "turns": stage.turns}
            _finish(out, parts, {**facts, "sources": licences, "files": digests}, reader.skipped)
    if not first:
        return {}
    shutil.rmtree(out / "parts", ignore_errors=True)
    counts: dict[str, float] = read_object(out / ROWS / "manifest.json")["counts"]
    return counts
