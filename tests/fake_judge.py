"""A deterministic OpenAI-compatible judge on loopback, with fault injection.

Its verdict depends on the prompt alone. Faults are drawn from the prompt and how often it was seen, so that a retry may succeed;
unreadable answers are drawn from the prompt alone, so that they stay.
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
    logprobs: bool = True
    page: bool = False  # answers with a page in the place of JSON
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


@contextmanager
def fake_judge(**faults: Any) -> Iterator[tuple[str, Faults]]:
    """Serve; yields the base URL and the faults, which also count what was asked."""
    state, lock = Faults(**faults), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: Any) -> None:
            pass

        def _send(self, status: int, body: dict[str, Any]) -> None:
            content = b"<html>Welcome</html>" if state.page else json.dumps(body).encode()
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
                return self._send(state.fatal, {"error": {"message": "no"}})
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
            self._send(200, reply(body["messages"], state))

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
