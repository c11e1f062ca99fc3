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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from tqdm import tqdm

from llamba.eval.journal import Journal
from llamba.eval.replies import Reply, has_no_money, parse, read_reply, short, validated

CHARACTERS_PER_TOKEN = 4
ALONE = 3  # requests that may go one by one until there is a reply to look at
UNREADABLE = 20  # replies that cannot be read, after which a run in which none can be read stops
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CONTROL = re.compile(r"<[|｜][^|｜<>\s]{1,40}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start_of_turn|end_of_turn|bos|eos|unk|pad)>")  # noqa: RUF001
_HALVES = re.compile("[\ud800-\udfff]")

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
    """A request without a usable reply, and why. `fatal`: it concerns all requests; `alone`: the server answered, and to this one only."""

    reason: str
    fatal: bool = False
    alone: bool = False


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
    """A name without what file names cannot hold; of a long one the beginning, and a hash."""
    found = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "model"
    return found if len(found) <= 70 else f"{found[:60]}-{digest(name)[:8]}"


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
        http = openai.DefaultHttpxClient(event_hooks={"response": [_no_second_try_without_money]})
        self.client = openai.OpenAI(
            base_url=judge.url, api_key=key or "none", max_retries=judge.retries, timeout=judge.timeout, http_client=http
        )

    def __call__(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """One request, asked; errors that concern every request are fatal."""
        (request,) = requests
        arguments = {k: v for k, v in {**request.parameters, **self.judge.parameters}.items() if v is not None}
        messages: Any = request.messages
        openai, ask = self.openai, self.client.chat.completions.with_raw_response.create
        try:
            got = ask(model=self.judge.model, messages=messages, extra_body=arguments)
            reply = read_reply(got.http_response.text)
        except openai.APIStatusError as error:
            return [self._refused(error)]
        except openai.OpenAIError as error:
            return [Failure(f"{type(error).__name__}: {short(error)}")]
        return [Failure(self._no_money(reply["why"]), fatal=True) if reply.get("no_money") else reply]

    def _refused(self, error: Any) -> Failure:
        """What a status of 400 or above means: for this request, for all of them, or for now."""
        status, said = error.status_code, short(error)
        if has_no_money(error.body) or status == 402:
            return Failure(self._no_money(said), fatal=True)
        if status == 401:
            return Failure(f"the judge refused the key in {self.judge.key_env} (401: {said}); set a valid one", fatal=True)
        if status == 404:
            return Failure(
                f"{self.judge.url} knows no model {self.judge.model!r} or no chat completions (404: {said}); correct both", fatal=True
            )
        return Failure(f"{status}: {said}", alone=status < 500 and status not in (408, 409, 429))

    def _no_money(self, said: str) -> str:
        return f"the account behind {self.judge.key_env} cannot pay ({said}); add credit"

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


def _no_second_try_without_money(response: Any) -> None:
    """Tells the openai client not to try again where the account is empty; it would, ten times, since the status is 429."""
    if response.status_code == 429:
        response.read()
        found = parse(response.text)
        if isinstance(found, dict) and has_no_money(found.get("error", found)):
            response.headers["x-should-retry"] = "false"


def _check_that_something_listens(url: str) -> None:
    where = urlsplit(url)
    host = where.hostname or ""
    if where.scheme in getproxies() and not proxy_bypass(host):
        return  # only the proxy can tell
    try:
        socket.create_connection((host, where.port or (443 if where.scheme == "https" else 80)), timeout=10).close()
    except OSError as error:
        raise ValueError(f"nothing answers at --judge-url {url} ({error}); start the server or correct the URL") from error


class JudgeClient:
    """Asks a judge through a journal. `usable` says whether a reply can be read; one that cannot be is asked again by the next run.

    `asked` counts the requests that were sent, `spent` the dollars.
    """

    def __init__(self, judge: Judge, journal: Journal, transport: Callable[[], Transport], output_tokens: float) -> None:
        self.judge, self.journal, self.make_transport, self.output_tokens = judge, journal, transport, output_tokens
        self.known: dict[str, Reply] = {row["key"]: validated(row.get("reply")) for row in journal.rows if isinstance(row.get("key"), str)}
        self.asked, self.spent, self.in_a_row = 0, 0.0, 0
        self.readable = self.unreadable = 0  # of the requests in hand
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

    def took(self, failures: Mapping[str, Failure]) -> str:
        """A line on what asking took, and why what failed did."""
        kinds = Counter(failure.reason.partition(":")[0] for failure in failures.values())
        why = "; ".join(f"{kind} ({number})" for kind, number in kinds.most_common(3))
        return (
            f"{self.asked} judgments asked for, {len(failures)} failed"
            + (f", ${self.spent:.2f}" if self.judge.price else "")
            + (f"\n  failures: {why}" + (" and others" if len(kinds) > 3 else "") if failures else "")
        )

    def ask(
        self,
        requests: Sequence[Request],
        usable: Callable[[Reply], bool],
        preflight: Callable[[Reply], str | None] = lambda reply: None,
    ) -> dict[str, Failure]:
        """Ask what is missing. Replies are in `known`; returned are the failures by key.

        `preflight` says what is wrong with the judge, from a reply; it is believed when the first few replies agree.

        Raises ValueError before the first request where the estimate exceeds `max_cost`, and after what was paid for is safe: where
        the judge refuses every request or fails the preflight, where no reply of the first 20 can be read, or the disk is full.
        """
        todo = self.missing(requests, usable)
        if not todo:
            return {}
        *_, dollars = self.estimate(todo)
        if self.judge.max_cost is not None and dollars > self.judge.max_cost:
            raise ValueError(f"asking {len(todo)} requests would cost about ${dollars:.2f}, above --max-cost {self.judge.max_cost}")
        self.readable, self.unreadable = len({request.key(self.judge) for request in requests}) - len(todo), 0
        transport, failures = self.make_transport(), dict[str, Failure]()
        chunks = [todo[:1]] + [todo[i : i + transport.batch] for i in range(1, len(todo), transport.batch)]  # the first alone
        with closing(transport), tqdm(total=len(todo), desc=f"judge {self.judge.model}", unit="reply", disable=None) as bar:

            def work(chunk: list[Request]) -> None:
                found = self._chunk(transport, chunk, usable)
                with self.lock:
                    failures.update(found)
                    bar.set_postfix(failed=len(failures))
                    bar.update(len(chunk))

            alone = self._one_by_one(work, chunks[:ALONE], preflight)
            few = sum(total <= UNREADABLE for total in accumulate(map(len, chunks)))  # chunks of the first 20 requests
            self._through(work, chunks[alone:few], transport.workers)
            self._through(work, chunks[few:], transport.workers)
        if self.full is not None:
            raise ValueError(f"the disk is full at {self.journal.path} ({self.full}); every reply so far is kept: make room and run again")
        if self.stopped:
            raise ValueError(f"{self.stopped}; {self.asked} requests were made and their replies are kept: run again to go on")
        return failures

    def _one_by_one(
        self, work: Callable[[list[Request]], None], chunks: list[list[Request]], preflight: Callable[[Reply], str | None]
    ) -> int:
        """Ask until there is a reply that a judge would give; returns the number of chunks. Raises ValueError where no reply is."""
        wrong = ""
        for number, chunk in enumerate(chunks, 1):
            work(chunk)
            replies = [self.known[key] for request in chunk if (key := request.key(self.judge)) in self.known]
            fine = [reply for reply in replies if reply["why"] is None and preflight(reply) is None]
            if fine or self.stopped:
                return number
            wrong = next((self._what_is_wrong(reply, preflight) for reply in replies), "") or wrong
        if wrong:
            raise ValueError(wrong)
        return len(chunks)

    def _what_is_wrong(self, reply: Reply, preflight: Callable[[Reply], str | None]) -> str:
        if reply.get("stranger"):
            said = short(reply.get("body"), 80)
            return f"{self.judge.url} answers, but not as a judge ({said!r}); correct --judge-url, it often ends in /v1"
        return (preflight(reply) or "") if reply["why"] is None else ""

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
            reply = _reply_of(reply)
            self._keep(key, request, reply, started)
            readable = reply["why"] is None and usable(reply)
            if not readable:
                cut = " (cut at its limit of tokens)" if reply["finish"] == "length" else ""
                failures[key] = Failure(reply["why"] or f"unreadable reply{cut}: {short(reply['text'], 80)!r}", alone=True)
            self._note_reply(failures.get(key))
        return failures

    def _note_failure(self, failure: Failure) -> None:
        with self.lock:
            self.in_a_row = 0 if failure.alone else self.in_a_row + 1
            if failure.fatal or self.in_a_row >= max(5, 2 * self.judge.concurrency):
                self.stopped = self.stopped or failure.reason
        if failure.alone:
            self._note_reply(failure)

    def _note_reply(self, failure: Failure | None) -> None:
        """Count what can be read and what cannot; stop where nothing can."""
        with self.lock:
            self.readable, self.unreadable = self.readable + (failure is None), self.unreadable + (failure is not None)
            if failure is not None and not self.readable and self.unreadable >= UNREADABLE:
                self.stopped = self.stopped or f"of {self.unreadable} replies none can be read (the last: {failure.reason})"

    def _keep(self, key: str, request: Request, reply: Reply, started: float) -> None:
        """Into the journal, before anybody looks at it; the money is spent, whatever it says."""
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


def _reply_of(reply: Reply) -> Reply:
    """A transport's reply with all its keys; what `read_reply` says of a body that is none stays."""
    return validated(reply) | {key: reply[key] for key in ("stranger", "body") if key in reply}
