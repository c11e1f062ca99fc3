"""A deterministic OpenAI-compatible judge on loopback, with fault injection.

Its verdict depends on the prompt alone. Faults are drawn from the prompt and how often it was seen, so that a retry may succeed;
unreadable answers and odd ones are drawn from the prompt alone, so that they stay.
"""

import hashlib
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_OUTPUTS = re.compile(r'"model_identifier": "([mM])",\s+"output": """(.*?)"""\s+}', re.DOTALL)


def share(*values: Any) -> float:
    """A number from 0 to 1 drawn from the values."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:6]) / 2**48


@dataclass
class Faults:
    """Shares of requests that meet each fault; `fatal` answers everything with that status."""

    too_many: float = 0.0
    broken: float = 0.0
    unreadable: float = 0.0
    fatal: int | None = None
    code: str | None = None  # the error's
    logprobs: bool = True
    page: bool = False  # answers with a page in the place of JSON
    odd: float = 0.0  # share of prompts that get one of `ODD`
    kinds: dict[str, str] = field(default_factory=dict)  # prompt: which of `ODD` it gets
    met: Counter = field(default_factory=Counter)  # which of `ODD` were sent
    seen: Counter = field(default_factory=Counter)
    served: int = 0
    requests: int = 0
    delay: float = 0.0
    key: str | None = None
    prompts: list[Any] = field(default_factory=list)


def verdict(prompt: str) -> str:
    """A rating; in pairwise prompts the longer one, whatever the order."""
    if "[[A]]" in prompt:
        found = re.findall(r"Start of Assistant ([AB])'s [^\]|]*(?:\]|\|>)(.*?)(?:\[|<\|)The End of Assistant", prompt, re.DOTALL)
        lengths = {name: len(text) for name, text in found}
        if lengths["A"] == lengths["B"]:
            return "Both alike. [[C]]"
        return f"I prefer one. [[{max(lengths, key=lambda name: lengths[name])}]]"
    return f"Decent. Rating: [[{1 + int(9 * share(prompt, 'rating'))}]]"


def preference(prompt: str) -> float:
    """Probability of "m": the longer output is preferred, and nothing else counts."""
    lengths = {name: len(text) for name, text in _OUTPUTS.findall(prompt)}
    return 1 / (1 + math.exp(-(lengths["m"] - lengths["M"]) / 800))


def reply(messages: list[dict[str, str]], faults: Faults) -> dict[str, Any]:
    """An OpenAI reply."""
    prompt = "\n".join(message["content"] for message in messages)
    unreadable = share(prompt, "unreadable") < faults.unreadable
    logprobs = None
    if "model_identifier" in prompt:
        p = preference(prompt)
        names = {"x": -0.1, "y": -3.0} if unreadable else {"m": math.log(max(p, 1e-9)), "M": math.log(max(1 - p, 1e-9))}
        top = [{"token": t, "logprob": v, "bytes": None} for t, v in sorted(names.items(), key=lambda item: -item[1])]
        text = top[0]["token"]
        if faults.logprobs:
            logprobs = {"content": [{**top[0], "top_logprobs": top}], "refusal": None}
    else:
        text = "I would rather not say." if unreadable else verdict(prompt)
    choice = {"index": 0, "finish_reason": "stop", "logprobs": logprobs, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4 + 1, "total_tokens": 0}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "fake-1", "choices": [choice], "usage": usage}


def _full_width(text: str) -> str:
    return text.translate({ord("0") + n: 0xFF10 + n for n in range(10)})


def _said(body: dict[str, Any], **message: Any) -> dict[str, Any]:
    choice = body["choices"][0]
    return body | {"choices": [choice | {"logprobs": None, "message": choice["message"] | {"content": None} | message}]}


def _entry(body: dict[str, Any], **change: Any) -> dict[str, Any]:
    """The body with its entry of log-probabilities changed; None takes a key out."""
    choice = body["choices"][0]
    entry = {"token": "m", "logprob": -0.1, "top_logprobs": []} | change
    return body | {"choices": [choice | {"logprobs": {"content": [{key: v for key, v in entry.items() if v is not None}]}}]}


def _text(body: dict[str, Any]) -> str:
    return body["choices"][0]["message"]["content"]


def _with_text(body: dict[str, Any], content: Any) -> dict[str, Any]:
    """Another content, log-probabilities as they were."""
    choice = body["choices"][0]
    return body | {"choices": [choice | {"message": choice["message"] | {"content": content}}]}


# Odd replies that can be read all the same: a good reply's body -> the odd one's.
READABLE: dict[str, Any] = {
    "full-width digits": lambda body: _with_text(body, _full_width(_text(body))),
    "leading zero": lambda body: _with_text(body, _text(body).replace("[[", "[[0") if "Rating" in _text(body) else _text(body)),
    "parts": lambda body: _with_text(body, [{"type": "thinking", "thinking": "[[1]]"}, {"type": "text", "text": _text(body)}, 3]),
    "thoughts": lambda body: _with_text(body, f"<think>Perhaps [[1]] or [[C]]? [[A]], [[B]]</think>\n{_text(body)}"),
    "thoughts begun in the prompt": lambda body: _with_text(body, f"Perhaps [[1]]? [[A]] [[B]] [[C]]</think>{_text(body)}"),
    "numbers as text": lambda body: body | {"usage": {"prompt_tokens": "7", "completion_tokens": None}, "model": 5},
    "no usage": lambda body: {key: value for key, value in body.items() if key != "usage"},
    "an error that is none": lambda body: body | {"error": None},
}
# Those that can be read as text, but not as log-probabilities.
AS_TEXT: dict[str, Any] = {
    "no top_logprobs": lambda body: _entry(body, top_logprobs=None),
    "top_logprobs that are none": lambda body: _entry(body, top_logprobs="none"),
    "log-probabilities as text": lambda body: _entry(body, top_logprobs=[{"token": "m", "logprob": "-0.1"}, 3]),
    "log-probabilities that are no numbers": lambda body: _entry(body, top_logprobs=[{"token": "m", "logprob": math.nan}]),
    "an empty list": lambda body: body | {"choices": [body["choices"][0] | {"logprobs": {"content": []}}]},
    "no log-probabilities": lambda body: body | {"choices": [body["choices"][0] | {"logprobs": None}]},
}
# Odd replies that cannot, with a word of the cause that is told: a good reply's body -> (status, the odd body), or text.
UNREADABLE: dict[str, tuple[str, Any]] = {
    "thoughts alone": ("thought", lambda body: (200, _said(body, reasoning_content="Hm. [[7]]"))),
    "thoughts without an end": ("unreadable", lambda body: (200, _said(body, content="<think>Perhaps [[7]], [[A]]"))),
    "a refusal": ("refused", lambda body: (200, _said(body, refusal="I cannot."))),
    "a refusal among parts": ("refused", lambda body: (200, _said(body, content=[{"type": "refusal", "refusal": "No."}]))),
    "an error under 200": ("an error", lambda body: (200, {"error": {"message": "overloaded", "code": 503}})),
    "an error as text": ("an error", lambda body: (200, {"error": "overloaded"})),
    "no choices": ("no choices", lambda body: (200, body | {"choices": []})),
    "choices that are none": ("no choices", lambda body: (200, body | {"choices": "none"})),
    "no message": ("no text", lambda body: (200, body | {"choices": [{"index": 0, "message": None}]})),
    "a tool": ("tool", lambda body: (200, _said(body, tool_calls=[{"id": "1", "type": "function", "function": {"name": "f"}}]))),
    "a filter": ("filter", lambda body: (200, body | {"choices": [_said(body)["choices"][0] | {"finish_reason": "content_filter"}]})),
    "endless digits": ("unreadable", lambda body: (200, _said(body, content=f"[[{'9' * 5000}]]"))),
    "half a character": ("unreadable", lambda body: (200, _said(body, content="\ud83d no"))),
    "forbidden": ("403", lambda body: (403, {"error": {"message": "flagged", "code": "content_policy"}})),
    "a bad request": ("400", lambda body: (400, {"error": {"message": "filtered", "code": "content_filter"}})),
    "a page": ("no JSON", lambda body: (200, "<html>busy</html>")),
    "nothing": ("no JSON", lambda body: (200, "")),
    "a list": ("no JSON", lambda body: (200, "[1, 2]")),
    "deep": ("no JSON", lambda body: (200, "[" * 100_000)),
}  # fmt: skip
ODD = (*READABLE, *AS_TEXT, *UNREADABLE)


def odd_of(prompt: str, faults: Faults) -> str | None:
    """Which odd reply a prompt gets, if any: one after the other, and the same again for the same prompt."""
    if share(prompt, "odd") >= faults.odd:
        return None
    return faults.kinds.setdefault(prompt, ODD[len(faults.kinds) % len(ODD)])


def made_odd(kind: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and body of an odd reply."""
    return UNREADABLE[kind][1](body) if kind in UNREADABLE else (200, (READABLE | AS_TEXT)[kind](body))


@contextmanager
def fake_judge(**faults: Any) -> Iterator[tuple[str, Faults]]:
    """Serve; yields the base URL and the faults, which also count what was asked."""
    state, lock = Faults(**faults), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: Any) -> None:
            pass

        def _send(self, status: int, body: Any) -> None:
            content = b"<html>Welcome</html>" if state.page else (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if state.page else "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status in (429, 500):
                self.send_header("retry-after-ms", "2")
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = json.dumps(body["messages"])
            with lock:
                state.requests += 1
                state.seen[prompt] += 1
                attempt = state.seen[prompt]
            if state.key is not None and self.headers.get("Authorization") != f"Bearer {state.key}":
                return self._send(401, {"error": {"message": "bad key"}})
            if state.fatal is not None:
                return self._send(state.fatal, {"error": {"message": "no", "type": state.code, "code": state.code}})
            drawn = share(prompt, attempt, "fault")
            if drawn < state.too_many:
                return self._send(429, {"error": {"message": "rate limit"}})
            if drawn < state.too_many + state.broken:
                return self._send(500, {"error": {"message": "oops"}})
            if state.delay:
                threading.Event().wait(state.delay)
            with lock:
                state.served += 1
                state.prompts.append(body)
            with lock:
                kind = odd_of(prompt, state)
                state.met.update([kind] if kind else [])
            if kind is None:
                return self._send(200, reply(body["messages"], state))
            self._send(*made_odd(kind, reply(body["messages"], state)))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", state
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with fake_judge() as (url, _):
        print(url, flush=True)
        threading.Event().wait()
