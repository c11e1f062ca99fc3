"""Asking a judge: many requests at once, every reply in a journal from the moment it is there, failures counted and told.

A judge is an OpenAI-compatible endpoint, or a Hugging Face model in this process (local_judge.py). A request that stands in the
journal is never asked again; one that failed is asked again by the next run.
"""

import hashlib
import json
import logging
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from tqdm import tqdm

from llamba.eval.journal import Journal

CHARACTERS_PER_TOKEN = 4
ALONE = 3  # requests that may go one by one until there is a reply to look at
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CONTROL = re.compile(r"<[|｜][^|｜<>\s]{1,40}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start_of_turn|end_of_turn|bos|eos|unk|pad)>")  # noqa: RUF001
_HALVES = re.compile("[\ud800-\udfff]")

Reply = dict[str, Any]  # text, logprobs, input_tokens, output_tokens, served_by
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Judge:
    """Who judges, how, and at what price. `parameters` override a request's own; None removes one (e.g. {"temperature": None})."""

    model: str
    url: str = "https://api.openai.com/v1"
    key_env: str = "OPENAI_API_KEY"
    parameters: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    retries: int = 10
    timeout: float = 120.0
    price: tuple[float, float] | None = None  # dollars per million input and output tokens
    max_cost: float | None = None

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https", "local"):
            raise ValueError(f"--judge-url must begin with http:// or https://, got {self.url}")
        if self.max_cost is not None and self.price is None:
            raise ValueError("--max-cost needs --price IN OUT (dollars per million tokens of the judge), got none")
        if self.concurrency < 1:
            raise ValueError(f"--concurrency must be at least 1, got {self.concurrency}")

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes this judge's scores from another's."""
        return {"model": self.model, "url": self.url, "parameters": self.parameters}

    @property
    def slug(self) -> str:
        """A file name for this judge: its name and a hash of all of its identity."""
        return f"{slug(self.model)}-{digest(self.identity)[:8]}"

    def key(self) -> str | None:
        """The key, if there is one. Raises ValueError where it is missing and the judge is on another machine."""
        key = os.environ.get(self.key_env)
        if not key and not self.url.startswith("local:") and urlsplit(self.url).hostname not in LOOPBACK:
            raise ValueError(f"the judge at {self.url} needs a key: set {self.key_env}, or name another variable with --key-env")
        return key

    def cost(self, input_tokens: float, output_tokens: float) -> float:
        """Dollars; 0 where no price is given."""
        return 0.0 if self.price is None else (input_tokens * self.price[0] + output_tokens * self.price[1]) / 1e6


@dataclass(frozen=True)
class Request:
    """One question to a judge; `repeat` distinguishes the same question asked again on purpose."""

    messages: Messages
    parameters: dict[str, Any]
    repeat: int = 0

    def key(self, judge: Judge) -> str:
        """Hash of judge, URL, parameters, whole prompt and repeat."""
        return digest([judge.identity, self.messages, self.parameters, self.repeat])

    @property
    def tokens(self) -> float:
        """Input tokens, estimated."""
        return sum(len(message["content"]) for message in self.messages) / CHARACTERS_PER_TOKEN


@dataclass
class Failure:
    """A request without a usable reply, and why."""

    reason: str
    fatal: bool = False


class Transport(Protocol):
    """Answers `batch` requests in one call, from up to `workers` threads."""

    batch: int
    workers: int

    def __call__(self, requests: Sequence[Request]) -> list[Reply | Failure]: ...

    def close(self) -> None: ...


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def slug(name: str) -> str:
    """A name without what file names cannot hold."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "model"


def escape(text: str) -> str:
    """Text whose chat control tokens no tokenizer reads as such: a space breaks them. Other text comes back as it is, but for halves of
    surrogate pairs, which cannot be sent."""
    return _CONTROL.sub(lambda match: match.group()[0] + " " + match.group()[1:], _HALVES.sub("\ufffd", text))


class Endpoint:
    """An OpenAI-compatible server. Back-off with jitter and Retry-After are the openai client's.

    Raises ValueError where the key is missing or nothing listens.
    """

    batch = 1

    def __init__(self, judge: Judge) -> None:
        import openai

        logging.getLogger("httpx").setLevel(logging.WARNING)
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        key = judge.key()
        _check_that_something_listens(judge.url)
        self.judge, self.workers, self.openai = judge, judge.concurrency, openai
        self.client = openai.OpenAI(base_url=judge.url, api_key=key or "none", max_retries=judge.retries, timeout=judge.timeout)

    def __call__(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """One request, asked; errors that concern every request are fatal."""
        (request,) = requests
        arguments = {k: v for k, v in {**request.parameters, **self.judge.parameters}.items() if v is not None}
        messages: Any = request.messages
        openai = self.openai
        try:
            got = self.client.chat.completions.create(model=self.judge.model, messages=messages, **arguments)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            return [Failure(f"the judge refused the key in {self.judge.key_env} ({error.status_code}); set a valid one", fatal=True)]
        except openai.NotFoundError as error:
            reason = f"{self.judge.url} knows no model {self.judge.model!r} or no chat completions (404: {_short(error)}); correct both"
            return [Failure(reason, fatal=True)]
        except openai.RateLimitError as error:
            return [Failure(f"429 {_short(error)}", fatal="insufficient_quota" in str(error))]
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            return [Failure(f"{type(error).__name__}: {_short(error)}")]
        if not isinstance(got, openai.types.chat.ChatCompletion):
            reason = f"{self.judge.url} answers, but not as a judge ({_short(got)!r}); correct --judge-url, it often ends in /v1"
            return [Failure(reason, fatal=True)]
        if not got.choices or got.choices[0].message.content is None:
            return [Failure("the reply holds no text")]
        choice, usage = got.choices[0], got.usage
        logprobs = choice.logprobs.model_dump() if choice.logprobs else None
        reply = {"text": choice.message.content, "logprobs": logprobs, "served_by": got.model}
        counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
        return [reply | dict(zip(("input_tokens", "output_tokens"), counts, strict=True))]

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


def _check_that_something_listens(url: str) -> None:
    where = urlsplit(url)
    host = where.hostname or ""
    if where.scheme in getproxies() and not proxy_bypass(host):
        return  # only the proxy can tell
    try:
        socket.create_connection((host, where.port or (443 if where.scheme == "https" else 80)), timeout=10).close()
    except OSError as error:
        raise ValueError(f"nothing answers at --judge-url {url} ({error}); start the server or correct the URL") from error


def _short(said: object) -> str:
    return " ".join(str(said).split())[:160]


class Asker:
    """Asks a judge through a journal. `usable` says whether a reply can be read; one that cannot be is asked again by the next run.

    `asked` counts the requests that were sent, `spent` the dollars.
    """

    def __init__(self, judge: Judge, journal: Journal, transport: Callable[[], Transport], output_tokens: float) -> None:
        self.judge, self.journal, self.make_transport, self.output_tokens = judge, journal, transport, output_tokens
        self.known: dict[str, Reply] = {row["key"]: row["reply"] for row in journal.rows}
        self.asked, self.spent, self.in_a_row = 0, 0.0, 0
        self.lock, self.stopped = threading.Lock(), ""
        self.full: OSError | None = None

    def missing(self, requests: Sequence[Request], usable: Callable[[Reply], bool]) -> list[Request]:
        """Requests without a usable reply in the journal, each once."""
        keys: dict[str, Request] = {request.key(self.judge): request for request in requests}
        return [request for key, request in keys.items() if key not in self.known or not usable(self.known[key])]

    def estimate(self, requests: Sequence[Request]) -> tuple[float, float, float]:
        """Input tokens, output tokens and dollars of asking these."""
        tokens = sum(request.tokens for request in requests)
        return tokens, len(requests) * self.output_tokens, self.judge.cost(tokens, len(requests) * self.output_tokens)

    def announce(self, requests: Sequence[Request], usable: Callable[[Reply], bool]) -> str:
        """A line on what asking what is missing will take."""
        todo = self.missing(requests, usable)
        inputs, outputs, dollars = self.estimate(todo)
        price = f", about ${dollars:.2f}" if self.judge.price else ""
        return (
            f"{self.judge.model}: {len(todo)} of {len(requests)} judgments to ask for, about {inputs:,.0f} + {outputs:,.0f} tokens{price}"
        )

    def took(self, failed: int) -> str:
        """A line on what asking took."""
        return f"{self.asked} judgments asked for, {failed} failed" + (f", ${self.spent:.2f}" if self.judge.price else "")

    def ask(
        self,
        requests: Sequence[Request],
        usable: Callable[[Reply], bool],
        preflight: Callable[[Reply], str | None] = lambda reply: None,
    ) -> dict[str, Failure]:
        """Ask what is missing. Replies are in `known`; returned are the failures by key.

        `preflight` says what is wrong with the judge, from its first reply.

        Raises ValueError before the first request where the estimate exceeds `max_cost`, and after what was paid for is safe: where
        the judge refuses every request or fails the preflight, or the disk is full.
        """
        todo = self.missing(requests, usable)
        if not todo:
            return {}
        *_, dollars = self.estimate(todo)
        if self.judge.max_cost is not None and dollars > self.judge.max_cost:
            raise ValueError(f"asking {len(todo)} requests would cost about ${dollars:.2f}, above --max-cost {self.judge.max_cost}")
        transport, failures = self.make_transport(), dict[str, Failure]()
        chunks = [todo[:1]] + [todo[i : i + transport.batch] for i in range(1, len(todo), transport.batch)]  # the first alone
        with closing(transport), tqdm(total=len(todo), desc=f"judge {self.judge.model}", unit="reply", disable=None) as bar:

            def work(chunk: list[Request]) -> None:
                found = self._chunk(transport, chunk, usable)
                with self.lock:
                    failures.update(found)
                    bar.set_postfix(failed=len(failures))
                    bar.update(len(chunk))

            alone = 0
            for chunk in chunks[:ALONE]:
                work(chunk)
                alone += 1
                replies = [self.known[key] for request in chunk if (key := request.key(self.judge)) in self.known]
                if replies and (wrong := preflight(replies[0])):
                    raise ValueError(wrong)
                if replies or self.stopped:
                    break
            self._through(work, chunks[alone:], transport.workers)
        if self.full is not None:
            raise ValueError(f"the disk is full at {self.journal.path} ({self.full}); every reply so far is kept: make room and run again")
        if self.stopped:
            raise ValueError(f"{self.stopped}; {self.asked} requests were made and their replies are kept: run again to go on")
        return failures

    def _through(self, work: Callable[[list[Request]], None], chunks: list[list[Request]], workers: int) -> None:
        with ThreadPoolExecutor(workers) as pool:
            futures, ended = [pool.submit(work, chunk) for chunk in chunks], False
            try:
                for future in futures:
                    future.result()
                ended = True
            finally:
                if not ended:  # a Ctrl-C above all: let no further request go out
                    self.stopped = self.stopped or "stopped"
                    pool.shutdown(cancel_futures=True)

    def _chunk(self, transport: Transport, chunk: list[Request], usable: Callable[[Reply], bool]) -> dict[str, Failure]:
        if self.stopped:
            return {request.key(self.judge): Failure(f"not asked: {self.stopped}") for request in chunk}
        with self.lock:
            self.asked += len(chunk)
        failures = {}
        started = time.time()
        for request, reply in zip(chunk, transport(chunk), strict=True):
            key = request.key(self.judge)
            if isinstance(reply, Failure):
                failures[key] = reply
                self._note_failure(reply)
                continue
            self._keep(key, request, reply, started)
            if not usable(reply):
                failures[key] = Failure(f"unreadable reply {reply['text'][:80]!r}")
        return failures

    def _note_failure(self, failure: Failure) -> None:
        with self.lock:
            self.in_a_row += 1
            if failure.fatal or self.in_a_row >= max(5, 2 * self.judge.concurrency):
                self.stopped = self.stopped or failure.reason

    def _keep(self, key: str, request: Request, reply: Reply, started: float) -> None:
        used = (reply["input_tokens"], reply["output_tokens"])
        tokens = (request.tokens, self.output_tokens) if None in used else used
        with self.lock:
            self.in_a_row, self.known[key] = 0, reply
            self.spent += self.judge.cost(*tokens)
            limit = math.inf if self.judge.max_cost is None else self.judge.max_cost
            if self.spent >= limit:
                self.stopped = self.stopped or f"--max-cost {limit} is spent (${self.spent:.2f})"
        try:
            self.journal.append({"key": key, "judge": self.judge.identity, "repeat": request.repeat, "reply": reply, "time": started})
        except OSError as error:
            self.full, self.stopped = error, "the disk is full"
