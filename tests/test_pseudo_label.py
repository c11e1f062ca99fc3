"""Pseudo-labels: answers against the teacher asked one by one, what is skipped, resume, several processes, and the engines."""

import importlib.util
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamba.chat.conversation import Sampling
from llamba.chat.engines import ENGINES, Answer, choose_engine
from llamba.data.batches import Rows
from llamba.data.tokens import StageData
from llamba.running import run as running
from llamba.settings import Data, Distill, PseudoLabel, Recipe, Student
from llamba.stages import prompts, pseudo_label

SHORT = dict(batch=4, max_new_tokens=6, unfinished="keep", engine="transformers")


def label(teacher: Path, source: Path, out: Path, **more) -> dict[str, float]:
    stage = PseudoLabel(**{**SHORT, **more})
    return pseudo_label.run(stage, "none", str(teacher), StageData(Data(train=str(source)), 7), out)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for file in sorted((out / "rows").glob("*.jsonl")) for line in file.read_text().splitlines()]


@torch.no_grad()
def greedy(teacher: Path, tokenizer, messages: list[dict]) -> str:
    """The teacher asked alone, with its whole forward pass for each token: no padding, no cache, no `generate`."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    while ids.shape[1] < start + SHORT["max_new_tokens"] and ids[0, -1] != tokenizer.eos_token_id:
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("turns", ["last", "all"])
def test_answers_are_the_teachers(tmp_path, teacher_folder, tokenizer, small, turns):
    """Each answer is what the teacher says alone; with all turns, after its own earlier answers. Rows stay in their order."""
    chats = small.chats(9, seed=3)
    source = small.write_rows(tmp_path / "rows.jsonl", chats)
    counts = label(teacher_folder, source, tmp_path / "out", turns=turns, temperature=0.0)
    found = rows_of(tmp_path / "out")
    assert counts["rows"] == len(found) == 9 and [row["source"] for row in found] == [f"{source}:{n}" for n in range(1, 10)]
    assert {len(chat["messages"]) for chat in chats} == {2, 4}
    for row, chat in zip(found, chats, strict=True):
        said, given = row["messages"], chat["messages"]
        users = [message for message in given if message["role"] == "user"]
        assert [message for message in said if message["role"] == "user"] == users and len(said) == len(given)
        answered = range(1, len(said), 2) if turns == "all" else [len(said) - 1]
        for place in answered:
            assert said[place] == {"role": "assistant", "content": greedy(teacher_folder, tokenizer, said[:place])}
        if turns == "last":
            assert said[:-1] == given[:-1]


def test_manifest_says_how(tmp_path, teacher_folder, chat_file):
    counts = label(teacher_folder, chat_file, tmp_path, rows=5, temperature=0.7, top_p=0.8)
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    assert manifest["sampling"] == {"max_new_tokens": 6, "temperature": 0.7, "top_p": 0.8, "seed": 7}
    assert manifest["teacher"] == str(teacher_folder) and manifest["engine"] == "transformers" and manifest["counts"] == counts
    assert list(manifest["files"]) == [str(chat_file)] and counts["rows"] == 5 and counts["answer_tokens"] > 5
    assert not (tmp_path / "parts").exists()


class Stop(Exception):
    """Stands for a kill."""


def stopping_after(calls: int) -> Callable:
    def engine(*arguments):
        inner, left = ENGINES_BEFORE["transformers"](*arguments), [calls]

        def answer(prompts, seed):
            if not left[0]:
                raise Stop
            left[0] -= 1
            return inner(prompts, seed)

        return answer

    return engine


ENGINES_BEFORE = dict(ENGINES)


def test_a_stopped_stage_goes_on_with_the_same_answers(tmp_path, teacher_folder, chat_file, monkeypatch):
    more = dict(turns="all", temperature=1.0, rows=30)
    label(teacher_folder, chat_file, tmp_path / "whole", **more)
    for calls in (3, 5):
        monkeypatch.setitem(ENGINES, "transformers", stopping_after(calls))
        with pytest.raises(Stop):
            label(teacher_folder, chat_file, tmp_path / "parts", **more)
    monkeypatch.setitem(ENGINES, "transformers", stopping_after(9))  # 8 batches, at most 2 turns each: some were answered before
    label(teacher_folder, chat_file, tmp_path / "parts", **more)
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    answers = [row["messages"][-1]["content"] for row in rows_of(tmp_path / "whole")]
    assert len(set(answers)) > 20  # sampled, and not the same in every batch
    monkeypatch.setitem(ENGINES, "transformers", stopping_after(0))
    assert label(teacher_folder, chat_file, tmp_path / "parts", **more)["rows"] == 30  # killed before DONE: nothing is asked again


def test_processes_share_the_work(tmp_path, teacher_folder, chat_file, monkeypatch):
    more = dict(temperature=1.0, rows=30)
    label(teacher_folder, chat_file, tmp_path / "one", **more)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert label(teacher_folder, chat_file, tmp_path / "two", **more) == {}
    assert sorted(int(part.stem) for part in (tmp_path / "two" / "parts").iterdir()) == [1, 3, 5, 7]
    monkeypatch.setenv("RANK", "0")
    label(teacher_folder, chat_file, tmp_path / "two", **more)
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setitem(ENGINES, "transformers", stopping_after(0))
    assert label(teacher_folder, chat_file, tmp_path / "two", **more) == {}  # late, and all is done


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_what_cannot_be_asked_is_counted(tmp_path, teacher_folder, small):
    good, long = small.chats(1)[0], {"messages": [user("red " * 300)]}
    silent = {"messages": [{"role": "system", "content": "be brief"}]}
    pair = {"prompt": "a red cat", "chosen": "sings", "rejected": "runs"}
    rows = [good, long, silent, {"messages": []}, {"messages": [user("  ")]}, pair]
    source = small.write_rows(tmp_path / "rows.jsonl", rows)
    counts = label(teacher_folder, source, tmp_path / "out")
    assert (counts["rows"], counts["too_long"], counts["no_prompt"], counts["empty"]) == (2, 1, 2, 1)
    assert rows_of(tmp_path / "out")[1]["messages"][0] == user("a red cat")


def test_cut_off_and_empty_answers_are_left_out(tmp_path, teacher_folder, small, tokenizer, monkeypatch):
    """A fixed engine: cut off, empty, good. Of a longer conversation the part before the bad answer stays."""
    word = tokenizer("cat", add_special_tokens=False)["input_ids"]

    def engine(*arguments):
        return lambda prompts, seed: [Answer([] if len(ids) % 3 == 1 else word, len(ids) % 3 != 2) for ids in prompts]

    monkeypatch.setitem(ENGINES, "transformers", engine)
    source = small.write_rows(tmp_path / "rows.jsonl", small.chats(40, seed=5))
    dropping = label(teacher_folder, source, tmp_path / "drop", turns="all", unfinished="drop")
    keeping = label(teacher_folder, source, tmp_path / "keep", turns="all", unfinished="keep")
    assert dropping["unfinished"] > 0 and dropping["empty_answer"] > 0 and dropping["shortened"] > 0
    assert dropping["rows"] + dropping["unfinished"] + dropping["empty_answer"] == 40
    assert keeping["unfinished"] == 0 and keeping["rows"] > dropping["rows"]
    for row in rows_of(tmp_path / "drop"):
        assert row["messages"][-1] == {"role": "assistant", "content": "cat"}


def test_later_stages_read_it(tmp_path, teacher_folder, chat_file, tokenizer):
    """`stage:pseudo_label` is the teacher's words, tokenised as any data folder; the run goes on with the student of before."""
    stages = [
        PseudoLabel(**SHORT, rows=12, turns="all"),
        Distill(data=Data(train="stage:pseudo_label", length=128), batch=4, micro_batch=4, steps=2, warmup=0, precision="fp32"),
    ]
    recipe = Recipe(str(teacher_folder), Student(), Data(train=str(chat_file), length=48), stages, str(tmp_path / "run"))
    last = running.run(recipe)
    assert (
        last.name == "2-distill" and (last / "model.safetensors").exists() and not (last.parent / "1-pseudo_label" / "config.json").exists()
    )
    [tokens] = (last.parent / "data").iterdir()
    texts = ["".join(message["content"] for message in row["messages"][1::2]) for row in rows_of(last.parent / "1-pseudo_label")]
    learnt = Rows(tokens / "train")
    assert len(learnt) == len(texts)
    ids = [item["labels"][item["labels"] >= 0] for item in (learnt[index] for index in range(len(learnt)))]
    assert [tokenizer.decode(one, skip_special_tokens=True) for one in ids] == texts


def test_refuses(tmp_path, teacher_folder, chat_file, small, monkeypatch):
    texts = small.write_rows(tmp_path / "texts.jsonl", [{"text": "red cat"}])
    with pytest.raises(ValueError, match=r"texts.jsonl:1: pseudo_label needs rows with messages or a prompt, got a text"):
        label(teacher_folder, texts, tmp_path / "a")
    with pytest.raises(ValueError, match="must leave room for a prompt in the teacher's 256 tokens, got 256"):
        label(teacher_folder, chat_file, tmp_path / "b", max_new_tokens=256)
    with pytest.raises(ValueError, match="no prompt was answered: .*'too_long': 64"):
        label(teacher_folder, chat_file, tmp_path / "c", max_prompt=2)
    with pytest.raises(ValueError, match="needs the package vllm .* use engine='transformers'"):
        label(teacher_folder, chat_file, tmp_path / "d", engine="vllm")
    with pytest.raises(ValueError, match="data.weights has no meaning"):
        stage, data = PseudoLabel(**SHORT), Data(train=str(chat_file), weights=[1.0])
        pseudo_label.run(stage, "none", str(teacher_folder), StageData(data, 0), tmp_path / "e")
    changing = small.write_rows(tmp_path / "rows.jsonl", small.chats(9))
    monkeypatch.setitem(ENGINES, "transformers", stopping_after(1))
    with pytest.raises(Stop):
        label(teacher_folder, changing, tmp_path / "f")
    small.write_rows(changing, small.chats(8))
    with pytest.raises(ValueError, match="holds answers that began with other files"):
        label(teacher_folder, changing, tmp_path / "f")


def test_batches_are_sorted_within_windows():
    made = [prompts.Prompt(index, "", [], length) for index, length in enumerate([5, 9, 7, 9, 1, 3])]
    grouped = [[prompt.index for prompt in batch] for batch in prompts.batches(iter(made), 2)]
    assert grouped == [[1, 3], [2, 0], [5, 4]]


def fake_vllm(log: list) -> SimpleNamespace:
    """vLLM's calls as its documentation gives them; answers with the prompt's last token and 1, which ends."""

    class LLM:
        def __init__(self, model: str, tensor_parallel_size: int):
            log.append((model, tensor_parallel_size))

        def generate(self, prompts, params, use_tqdm):
            log.append(params)
            outputs = [SimpleNamespace(token_ids=[one["prompt_token_ids"][-1], 1], finish_reason="stop") for one in prompts]
            return [SimpleNamespace(outputs=[output]) for output in outputs]

    return SimpleNamespace(LLM=LLM, SamplingParams=lambda **values: values)


def test_vllm_engine(monkeypatch):
    log: list = []
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(log))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    engine = ENGINES["vllm"]("org/model", Sampling(9, 0.5, 0.8), [1, 2])
    assert engine([[5, 6], [7]], 100) == [Answer([6], True), Answer([7], True)]
    assert log[0] == ("org/model", 1)
    shared = {"temperature": 0.5, "top_p": 0.8, "max_tokens": 9, "stop_token_ids": [1, 2]}
    assert log[1] == [{**shared, "seed": 100}, {**shared, "seed": 101}]
    assert choose_engine("auto") == ("vllm" if torch.accelerator.is_available() else "transformers") and choose_engine("vllm") == "vllm"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start the recipe with python"):
        ENGINES["vllm"]("org/model", Sampling(), [1])


@pytest.mark.slow
def test_killed_processes_answer_the_same(tmp_path, teacher_folder, chat_file):
    """SIGKILL at three points, then once to the end."""
    more = dict(temperature=1.0, batch=2)
    label(teacher_folder, chat_file, tmp_path / "whole", **more)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llamba.stages"])
    for wanted in (2, 9, 20):
        process = context.Process(target=label, args=(teacher_folder, chat_file, tmp_path / "killed"), kwargs=more)
        process.start()
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "killed" / "parts").glob("*"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    label(teacher_folder, chat_file, tmp_path / "killed", **more)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
