"""One request's answer: tokens of `generate` as text, cut at a stop string, with log-probabilities, until the client has gone.

What `llamba.chat.serving` puts in place of transformers' generation manager.
"""

import asyncio
import copy
import json
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.cli.serving.utils import BaseGenerateManager, InferenceThread, _StreamError

LOOKED_UP = 8  # tokens that a lookup in the text drafts at a time
cancelled: ContextVar[threading.Event | None] = ContextVar("cancelled", default=None)  # set where the client of this request has gone


class Piece(str):
    """Text of an answer, with the log-probabilities of its tokens where they were asked for."""

    places: list[dict[str, Any]]

    def __new__(cls, text: str, places: list[dict[str, Any]]) -> "Piece":
        made = super().__new__(cls, text)
        made.places = places
        return made


class Cancelled(Exception):
    """The client has gone."""


@dataclass
class Asked:
    """What a request asks for beside the values of a generation configuration."""

    seed: int | None = None
    stops: list[str] = field(default_factory=list)
    logprobs: int | None = None  # likeliest tokens at each place; None: no log-probabilities


class Recorder(LogitsProcessor):
    """Keeps, by position, the log-probabilities of the model before temperature and top-p."""

    def __init__(self, count: int):
        self.count, self.kept = count, dict[int, Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.kept[input_ids.shape[1]] = scores[0].float().log_softmax(-1)
        return scores


class Answer:
    """Receives tokens from `generate`, cuts at a stop string, and hands text on as soon as no stop string can begin in it."""

    def __init__(self, tokenizer: Any, asked: Asked, prompt: int, emit: Callable[[Any], None], cancelled: threading.Event | None):
        self.tokenizer, self.asked, self.emit = tokenizer, asked, emit
        self.cancelled = cancelled or threading.Event()
        self.recorder = None if asked.logprobs is None else Recorder(asked.logprobs)
        self.position, self.total_tokens = prompt, 0
        self.stopped, self.tokens = False, list[int]()
        self._decode, self._seen_prompt = DecodeStream([], skip_special_tokens=True), False
        self._sent, self._held, self._places = "", "", list[Any]()

    def cancel(self) -> None:
        """The next token ends the generation."""
        self.cancelled.set()

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, then with new tokens."""
        if self.cancelled.is_set():
            raise Cancelled
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        for token in value.flatten().tolist():
            if self.stopped:
                return
            self._take(token)

    def _take(self, token: int) -> None:
        self.total_tokens += 1
        self.tokens.append(token)
        if self.recorder is not None:
            self._places.append(self._place(token))
        self.position += 1
        self._held += self._decode.step(self.tokenizer._tokenizer, token) or ""
        found = [at for at in (self._held.find(stop) for stop in self.asked.stops) if at >= 0]
        if found:
            self.stopped, self._held = True, self._held[: min(found)]
            self._hand_on(len(self._held))
        else:
            self._hand_on(len(self._held) - self._begun())

    def _begun(self) -> int:
        """Characters at the end of the held text that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self.asked.stops), default=0)
        sizes = range(min(len(self._held), longest - 1), 0, -1)
        return next((size for size in sizes if any(stop.startswith(self._held[-size:]) for stop in self.asked.stops)), 0)

    def _hand_on(self, size: int) -> None:
        if size or (self._places and self.stopped):
            self.emit(Piece(self._held[:size], self._places))
            self._sent += self._held[:size]
            self._held, self._places = self._held[size:], []

    def _place(self, token: int) -> dict[str, Any]:
        assert self.recorder is not None and self.asked.logprobs is not None
        row = self.recorder.kept.pop(self.position)
        top = row.topk(self.asked.logprobs)
        others = [self._one(int(index), float(value)) for value, index in zip(*top, strict=True)]
        return self._one(token, float(row[token])) | {"top_logprobs": others}

    def _one(self, token: int, value: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": max(value, -9999.0), "bytes": list(text.encode())}

    def end(self) -> None:
        """Called by `generate` behind the last token."""
        if not self.stopped:
            whole, known = self.tokenizer.decode(self.tokens, skip_special_tokens=True), self._sent + self._held
            self._held += whole[len(known) :] if whole.startswith(known) else ""  # a character that the last token began
            self.stopped = True
            self._hand_on(len(self._held))


class Manager(BaseGenerateManager):
    """Answers requests one after the other on one thread."""

    def __init__(self, draft: Any = None):
        self.draft, self._thread = draft, InferenceThread()

    def stop(self) -> None:
        """Nothing is to be freed: the thread ends with the process."""

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        """A queue of pieces (None behind the last) and the answer, which can be cancelled."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def emit(item: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        answer = self._answer(processor, inputs, gen_config, emit)
        future = self._thread.async_submit(self._run, model, processor, inputs, gen_config, answer)
        future.add_done_callback(lambda done: queue.put_nowait(_StreamError(_said(done)) if done.exception() else None))
        return queue, answer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        """The whole text, the prompt's tokens, and the new tokens."""
        pieces: list[Piece] = []
        answer = self._answer(processor, inputs, gen_config, pieces.append)
        await self._thread.async_submit(self._run, model, processor, inputs, gen_config, answer)
        text = Piece("".join(pieces), [place for piece in pieces for place in piece.places])
        return text, inputs["input_ids"].shape[-1], answer.tokens

    def _answer(self, processor: Any, inputs: Any, config: Any, emit: Callable[[Any], None]) -> Answer:
        return Answer(processor, config.asked, inputs["input_ids"].shape[-1], emit, cancelled.get())

    def _run(self, model: Any, tokenizer: Any, inputs: Any, config: Any, answer: Answer) -> None:
        if answer.cancelled.is_set():
            return
        if config.asked.seed is not None:
            torch.manual_seed(config.asked.seed)
        plain = copy.copy(config)
        del plain.asked
        stop = StoppingCriteriaList([lambda ids, scores, **_: torch.full((1,), answer.stopped, device=ids.device)])
        record = LogitsProcessorList([answer.recorder] if answer.recorder is not None else [])
        if self.draft == "lookup":
            plain.prompt_lookup_num_tokens = LOOKED_UP
        more = {} if self.draft in (None, "lookup") else {"assistant_model": self.draft}
        try:
            model.generate(
                **inputs, generation_config=plain, streamer=answer, logits_processor=record, stopping_criteria=stop, **more
            )  # fmt: skip
            answer.end()
        except Cancelled:
            return


def _said(done: Any) -> str:
    return json.dumps(str(done.exception()))[1:-1]
