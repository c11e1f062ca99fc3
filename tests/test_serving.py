"""The server, driven by OpenAI's own client: answers are those of `generate`, whatever else is asked for and whoever hangs up."""

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import uvicorn
from openai import APIStatusError, AsyncOpenAI, AuthenticationError, BadRequestError, NotFoundError, OpenAI, RateLimitError

from llamba.base.arguments import Parser
from llamba.chat.serving import KEEP_ALIVE, application, check_host, is_loopback
from llamba.commands.serve import serve
from llamba.models.convert import convert

assert Parser  # the command's parser loads nothing of the server
KEY = "a-key"


@pytest.fixture(scope="module")
def model(small, tokenizer) -> Any:
    made = convert(small.llama(len(tokenizer)), init="paper")
    made.generation_config.pad_token_id = tokenizer.pad_token_id
    return made


class Running:
    """A server on a port of its own, in a thread."""

    def __init__(self, app: Any):
        self.door = app
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_keep_alive=KEEP_ALIVE))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/v1"

    def client(self, key: str = KEY, **more: Any) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, **more)

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def running(model, tokenizer) -> Iterator[Running]:
    made = Running(application("student", model, tokenizer, key=KEY, queue=4))
    yield made
    made.end()


def own(model: Any, tokenizer: Any, prompt: str, new: int) -> str:
    """What `generate` answers, greedily."""
    inputs = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_completions_are_generates(running: Running, model: Any, tokenizer: Any) -> None:
    client = running.client()
    want = own(model, tokenizer, "red green", 12)
    asked: dict[str, Any] = {"model": "student", "prompt": "red green", "max_tokens": 12, "temperature": 0}
    found = client.completions.create(**asked)
    assert found.choices[0].text == want and found.usage.completion_tokens <= 12
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(pieces) == want and len(pieces) > 3
    assert [one.id for one in client.models.list()] == ["student"]


def test_chats_are_generates(running: Running, model: Any, tokenizer: Any) -> None:
    client, messages = running.client(), [{"role": "user", "content": "blue cat"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    made = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    want = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    asked: dict[str, Any] = {"model": "student", "messages": messages, "max_tokens": 10, "temperature": 0}
    assert client.chat.completions.create(**asked).choices[0].message.content == want
    streamed = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(streamed) == want


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(running: Running, model: Any, tokenizer: Any) -> None:
    client, whole = running.client(), own(model, tokenizer, "red green", 16)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    asked: dict[str, Any] = {"model": "student", "prompt": "red green", "max_tokens": 16, "temperature": 0, "stop": [stop, "never said"]}
    want = whole[: whole.index(stop)]
    assert client.completions.create(**asked).choices[0].text == want
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)) == want


def test_a_seed_repeats_and_another_does_not(running: Running) -> None:
    client = running.client()

    def sampled(seed: int) -> str:
        return client.completions.create(model="student", prompt="red", max_tokens=16, temperature=1.5, seed=seed).choices[0].text

    assert sampled(1) == sampled(1) and len({sampled(seed) for seed in range(4)}) > 1


def test_log_probabilities_are_the_models(running: Running, model: Any, tokenizer: Any) -> None:
    client, inputs = running.client(), tokenizer("red green", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        rows = model(tokens).logits[0].log_softmax(-1)[inputs["input_ids"].shape[1] - 1 : -1]
    want = [float(row[token]) for row, token in zip(rows, tokens[0, inputs["input_ids"].shape[1] :], strict=True)]
    found = client.completions.create(model="student", prompt="red green", max_tokens=6, temperature=0, logprobs=3)
    places = found.choices[0].logprobs
    assert places.token_logprobs == pytest.approx(want, abs=1e-4)
    assert max(places.top_logprobs[0].values()) == pytest.approx(float(rows[0].max()), abs=1e-4)
    messages: Any = [{"role": "user", "content": "blue"}]
    chat = client.chat.completions.create(model="student", messages=messages, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2)
    assert len(chat.choices[0].logprobs.content) <= 4 and len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = client.chat.completions.create(
        model="student", messages=messages, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2, stream=True
    )
    streamed = [place for chunk in stream if chunk.choices[0].logprobs for place in chunk.choices[0].logprobs.content]
    assert [place.logprob for place in streamed] == pytest.approx([place.logprob for place in chat.choices[0].logprobs.content], abs=1e-4)


def test_what_is_not_served_is_refused(running: Running) -> None:
    client = running.client()
    for field in ({"n": 2}, {"temperature": -1}, {"stop": [""]}, {"logprobs": 99}, {"frequency_penalty": 0.5}, {"suffix": "x"}):
        with pytest.raises(BadRequestError) as refused:
            client.completions.create(model="student", prompt="red", max_tokens=2, **field)
        said = refused.value.response.json()["error"]["message"]
        assert next(iter(field)) in said or "log-probabilities" in said
    with pytest.raises(BadRequestError):
        client.completions.create(model="another", prompt="red", max_tokens=2)
    with pytest.raises(AuthenticationError):
        running.client("wrong").completions.create(model="student", prompt="red", max_tokens=2)
    with pytest.raises(NotFoundError):
        client.post("/../load_model", body={"model": "x"}, cast_to=object)


def test_only_this_machine_is_served_without_a_key(model, tokenizer) -> None:
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost") and not is_loopback("0.0.0.0")
    with pytest.raises(ValueError, match="a key is needed"):
        check_host("0.0.0.0", None)
    open_ = Running(application("student", model, tokenizer))
    try:
        assert open_.client().completions.create(model="student", prompt="red", max_tokens=2).choices
        with pytest.raises(APIStatusError):  # a page of another name that was made to mean this machine
            open_.client(default_headers={"Host": "elsewhere.example"}).models.list()
    finally:
        open_.end()


def test_the_queue_is_bounded_and_a_client_that_hangs_up_frees_its_place(running: Running) -> None:
    async def crowd() -> None:
        async with AsyncOpenAI(base_url=running.url, api_key=KEY, max_retries=0) as client:
            await crowded(client)

    async def crowded(client: AsyncOpenAI) -> None:
        asked: dict[str, Any] = {"model": "student", "prompt": "red", "max_tokens": 200, "temperature": 0}
        streams = [await client.completions.create(**asked, stream=True) for _ in range(3)]
        waiting = asyncio.create_task(client.completions.create(**asked))
        await asyncio.sleep(0.1)
        with pytest.raises(RateLimitError):
            await client.completions.create(**asked)
        for stream in streams:
            await stream.close()
        waiting.cancel()
        for _ in range(500):
            if running.door.waiting == 0:
                break
            await asyncio.sleep(0.01)
        assert running.door.waiting == 0
        assert (await client.completions.create(**asked | {"max_tokens": 2})).choices

    asyncio.run(crowd())


def test_a_draft_changes_no_answer(model, tokenizer, small) -> None:
    draft, prompt = small.llama(len(tokenizer), seed=3, num_hidden_layers=1), "red green blue"
    for one in (draft, "lookup"):
        made = Running(application("student", model, tokenizer, draft=one))
        try:
            asked: dict[str, Any] = {"model": "student", "prompt": prompt, "max_tokens": 12, "temperature": 0}
            found = made.client().completions.create(**asked, logprobs=1).choices[0]
            assert found.text == own(model, tokenizer, prompt, 12)
            assert max(found.logprobs.token_logprobs) <= 0
        finally:
            made.end()


def test_the_command_refuses_before_it_loads() -> None:
    with pytest.raises(ValueError, match="a key is needed"):
        serve(["nowhere", "--host", "0.0.0.0"])
    with pytest.raises(ValueError, match="--queue"):
        serve(["nowhere", "--queue", "0"])


@pytest.mark.slow
def test_streams_and_cancels_soak(tmp_path) -> None:
    """64 streams at once, then 2,000 requests, many of which hang up: generate's answers, no error but the queue's, no place lost."""
    from transformers import AutoTokenizer

    folder = "recipes/tiny/teacher"
    made, words = convert(folder, init="paper").float().eval(), AutoTokenizer.from_pretrained(folder)
    prompts = [f"word {number} and" for number in range(8)]
    answers = {prompt: own(made, words, prompt, 6) for prompt in prompts}
    server = Running(application("student", made, words, key=KEY, queue=64))

    async def one(client: AsyncOpenAI, number: int, hang_up: bool, seen: SimpleNamespace) -> None:
        prompt = prompts[number % len(prompts)]
        asked: dict[str, Any] = {"model": "student", "prompt": prompt, "max_tokens": 6, "temperature": 0}
        try:
            stream = await client.completions.create(**asked, stream=True)
            text = ""
            async for chunk in stream:
                text += chunk.choices[0].text
                if hang_up:
                    await stream.close()
                    seen.hung_up += 1
                    return
            assert text == answers[prompt]
            seen.answered += 1
        except RateLimitError:
            seen.full += 1

    async def soak() -> tuple[SimpleNamespace, SimpleNamespace]:
        rng = random.Random(0)
        first, then = (SimpleNamespace(answered=0, hung_up=0, full=0) for _ in range(2))
        async with AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=600) as client:
            await asyncio.gather(*(one(client, number, False, first) for number in range(64)))
            for start in range(0, 2000, 80):
                await asyncio.gather(*(one(client, number, rng.random() < 0.4, then) for number in range(start, start + 80)))
        for _ in range(1000):
            if server.door.waiting == 0:
                break
            await asyncio.sleep(0.02)
        return first, then

    try:
        first, then = asyncio.run(soak())
        assert (first.answered, first.full) == (64, 0)
        assert then.answered + then.hung_up + then.full == 2000 and then.hung_up > 300 and then.answered > 600
        assert server.door.waiting == 0
    finally:
        server.end()
