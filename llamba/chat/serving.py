"""An OpenAI server for one model: the application of `transformers serve`, with what it lacks.

transformers brings routes, chat templates and streaming. Here: one model and, if wanted, a draft; log-probabilities; stop strings that do
not appear in the answer; a seed for each request; cancelling; a key; a bounded queue; and a refusal instead of a warning for what is not
served. Requests are answered one after the other: a recurrent state is not batched continuously.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import threading
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import Modality

from llamba.chat.answering import Asked, Manager, Piece, cancelled

KEEP_ALIVE = 75  # seconds that an idle connection stays open: longer than clients keep theirs, or both end it at once and a request is lost
ROUTES = {("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/health")}
SERVED = {
    "model", "messages", "prompt", "stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "logprobs",
    "top_logprobs", "chat_template_kwargs", "user", "n", "frequency_penalty", "presence_penalty",
}  # fmt: skip
NEUTRAL = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0}  # served with this value alone
MOST_LOGPROBS, MOST_STOPS = 20, 16


class _State:
    """What the handlers ask of transformers' generation state."""

    _compile = False

    def __init__(self, manager: Manager):
        self._manager = manager

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        return False

    def get_manager(self, model_id: str, use_cb: bool = False) -> Manager:
        return self._manager

    def is_cb_alive(self) -> bool:
        return True


class _Models:
    """What the handlers ask of transformers' model manager: one model, which is there."""

    def __init__(self, name: str, model: Any, tokenizer: Any):
        self.force_model, self.model, self.tokenizer = name, model, tokenizer

    def process_model_name(self, name: str) -> str:
        return name

    def load_model_and_processor(self, model_id: str, gguf_file: Any = None) -> tuple[Any, Any]:
        return self.model, self.tokenizer

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:
        return Modality.LLM

    def get_gen_models(self, cache_dir: Any = None) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "llamba"}]

    def shutdown(self) -> None:
        """Nothing is loaded on demand."""


class _Checked:
    """Mixed into transformers' handlers: a field that is not served is refused, and what a request asks for goes along."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        for name, value in body.items():
            if name not in SERVED or (name in NEUTRAL and value not in (NEUTRAL[name], None)):
                raise HTTPException(400, f"{name}={value!r} is not served here; served are {', '.join(sorted(SERVED))}")
        for name, low, high in (("temperature", 0, 2), ("top_p", 0, 1), ("max_tokens", 1, None), ("max_completion_tokens", 1, None)):
            value = body.get(name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or value < low or value > (high or value)
            ):
                raise HTTPException(400, f"{name} must be {f'from {low} to {high}' if high else f'at least {low}'}; got {value!r}")
        body["asked"] = _asked(body)

    def _build_generation_config(self, body: dict[str, Any], model_config: GenerationConfig, use_cb: bool = False) -> Any:
        plain = {name: value for name, value in body.items() if name not in ("stop", "seed", *NEUTRAL)}
        config = super()._build_generation_config(plain, model_config, use_cb=use_cb)  # type: ignore[misc]
        config.do_sample = config.do_sample if body.get("temperature") is None else body["temperature"] > 0
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        elif body.get("temperature") is not None:
            config.top_k = 0
        config.asked = body["asked"]
        return config


def _asked(body: dict[str, Any]) -> Asked:
    stop = body.get("stop") or []
    stops = [stop] if isinstance(stop, str) else list(stop)
    if len(stops) > MOST_STOPS or not all(isinstance(one, str) and one for one in stops):
        raise HTTPException(400, f"stop must be a text or a list of at most {MOST_STOPS} texts; got {stop!r}")
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    count = None if wanted in (None, False) else int(top or 0) if wanted is True else int(wanted)
    if count is not None and not 0 <= count <= MOST_LOGPROBS:
        raise HTTPException(400, f"log-probabilities of at most {MOST_LOGPROBS} tokens are served; got {count}")
    return Asked(body.get("seed"), stops, count)


class Chats(_Checked, ChatCompletionHandler):
    """/v1/chat/completions."""

    def _build_chunk_sse(self, request_id: str = "", content: str | None = None, **more: Any) -> str:  # type: ignore[override]
        text = super()._build_chunk_sse(request_id, content, **more)
        return _with_places(text, _chat_places(content)) if isinstance(content, Piece) and content.places else text

    def _build_completion(self, request_id: str, content: str, *rest: Any, **more: Any) -> dict[str, Any]:
        made = super()._build_completion(request_id, content, *rest, **more)
        if isinstance(content, Piece) and content.places:
            made["choices"][0]["logprobs"] = _chat_places(content)
        return made


class Completions(_Checked, CompletionHandler):
    """/v1/completions."""

    def _build_chunk_sse(self, request_id: str, model_id: str, text: str = "", *rest: Any, **more: Any) -> str:
        chunk = super()._build_chunk_sse(request_id, model_id, text, *rest, **more)
        return _with_places(chunk, _text_places(text)) if isinstance(text, Piece) and text.places else chunk

    async def _non_streaming(
        self, request_id: str, model: Any, processor: Any, model_id: str, inputs: Any, config: Any, manager: Any, *rest
    ):
        pieces: list[Any] = []

        class Kept(Manager):  # the response is built inside; the text's log-probabilities are put in behind
            def __init__(self) -> None:
                self.draft, self._thread = manager.draft, manager._thread

            async def generate_non_streaming(self, *arguments: Any, **named: Any) -> Any:
                found = await super().generate_non_streaming(*arguments, **named)
                pieces.append(found[0])
                return found

        response = await super()._non_streaming(request_id, model, processor, model_id, inputs, config, Kept(), *rest)
        if pieces[0].places:
            body = json.loads(bytes(response.body))
            body["choices"][0]["logprobs"] = _text_places(pieces[0])
            response.body = response.render(body)
            response.headers["content-length"] = str(len(response.body))
        return response


def _with_places(sse: str, places: dict[str, Any]) -> str:
    chunk = json.loads(sse.removeprefix("data: "))
    chunk["choices"][0]["logprobs"] = places
    return f"data: {json.dumps(chunk)}\n\n"


def _chat_places(piece: Piece) -> dict[str, Any]:
    return {"content": piece.places, "refusal": None}


def _text_places(piece: Piece) -> dict[str, Any]:
    return {
        "tokens": [place["token"] for place in piece.places],
        "token_logprobs": [place["logprob"] for place in piece.places],
        "top_logprobs": [{top["token"]: top["logprob"] for top in place["top_logprobs"]} for place in piece.places],
        "text_offset": [],
    }


class Door:
    """Around the application: routes that are served, a key, a bounded queue, and an event that says that a request's client is gone."""

    def __init__(self, app: Any, key: str | None, queue: int):
        self.app, self.key, self.queue, self.waiting = app, key, queue, 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """The application, for requests that may come in."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        route = (scope["method"], scope["path"])
        if route not in ROUTES:
            return await _refuse(send, 404, "not_found", f"{route[0]} {route[1]} is not served here")
        if self.key is not None and route[1] != "/health" and not _has_key(scope, self.key):
            return await _refuse(send, 401, "invalid_api_key", "a key is needed: Authorization: Bearer KEY")
        if route[0] != "POST":
            return await self.app(scope, receive, send)
        if self.waiting >= self.queue:
            return await _refuse(send, 429, "queue_full", f"{self.waiting} requests wait or run, which is the most; try again later")
        self.waiting += 1
        try:
            await self._with_watch(scope, receive, send)
        finally:
            self.waiting -= 1

    async def _with_watch(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        messages, gone, event = asyncio.Queue[Any](), asyncio.Event(), threading.Event()
        cancelled.set(event)

        async def watch() -> None:
            while not gone.is_set():
                message = await receive()
                if message["type"] == "http.disconnect":
                    event.set()
                    gone.set()
                await messages.put(message)

        watching = asyncio.create_task(watch())
        try:
            await self.app(scope, messages.get, send)
        finally:
            watching.cancel()


async def _as_openai(_: Any, error: Any) -> JSONResponse:
    """FastAPI's error in the form that OpenAI's clients read."""
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return JSONResponse({"error": {"message": str(error.detail), "type": kind, "code": None}}, error.status_code)


def _has_key(scope: dict[str, Any], key: str) -> bool:
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    return hmac.compare_digest(given, f"Bearer {key}".encode())


async def _refuse(send: Any, status: int, code: str, message: str) -> None:
    body = json.dumps({"error": {"message": message, "type": code, "code": code}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"retry-after", b"1")] if status == 429 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def is_loopback(host: str) -> bool:
    """Whether a server bound to this host is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def application(name: str, model: Any, tokenizer: Any, draft: Any = None, key: str | None = None, queue: int = 64) -> Door:
    """The ASGI application for a loaded model, called `name`; at most `queue` requests wait or run at a time.

    Without a key, only requests to this machine's own names are answered, whatever page sends them.
    """
    models, state = _Models(name, model, tokenizer), _State(Manager(draft))
    arguments: Any = (models, Chats(models, state), Completions(models, state), None, None, None, state)  # type: ignore[arg-type]
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # it warns of each request
    app: FastAPI = build_server(*arguments)
    app.add_exception_handler(HTTPException, _as_openai)
    if key is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "testserver"])
    return Door(app, key, queue)


def check_host(host: str, key: str | None) -> None:
    """Raises ValueError for a host that other machines reach, without a key."""
    if not key and not is_loopback(host):
        raise ValueError(f"a key is needed where other machines reach the server: --api-key, or LLAMBA_API_KEY; got none for host {host}")


def serve(name: str, model: Any, tokenizer: Any, host: str, port: int, draft: Any = None, key: str | None = None, queue: int = 64) -> None:
    """Serve a loaded model until the process is told to end; errors as in `check_host`."""
    check_host(host, key)
    import uvicorn

    app = application(name, model, tokenizer, draft, key, queue)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_keep_alive=KEEP_ALIVE)
