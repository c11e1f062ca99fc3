"""The embedded teacher's language, and the teacher: its answers are checkable, its exams unseen, its folder an ordinary checkpoint."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).parent.parent / "recipes" / "tiny"
sys.path.insert(0, str(TINY))

import demo  # noqa: E402
import language  # noqa: E402


def test_answers_are_right() -> None:
    """Each skill against a second way of computing the answer."""
    rng = random.Random(0)
    for _ in range(200):
        asked = {skill: language.ask(skill, rng) for skill in language.QUESTIONS}
        words = {skill: question.split(": ")[-1].split() for skill, (question, _) in asked.items()}
        assert asked["copy"][1].split() == words["copy"]
        assert list(reversed(asked["reverse"][1].split())) == words["reverse"]
        assert sorted(map(int, words["sort"])) == list(map(int, asked["sort"][1].split()))
        numbers = {skill: [int(n) for n in "".join(c if c.isdigit() else " " for c in q).split()] for skill, (q, _) in asked.items()}
        assert sum(numbers["add"]) == int(asked["add"][1])
        assert sorted(numbers["compare"])[-1] == int(asked["compare"][1])
        assert numbers["after"][0] == int(asked["after"][1]) - 1
        assert words["pick"].index(asked["pick"][1]) == numbers["pick"][0] - 1
        assert [
            w.strip('[]",-0123456789. ') for w in asked["format"][1].replace(",", "\n").split() if any(c.isalpha() for c in w)
        ] == words["format"]
        first, second = asked["opposite"][0].removeprefix("Opposites of ").rstrip("?").split(" and ")
        back = {b: a for a, b in language.OPPOSITES.items()} | language.OPPOSITES
        assert asked["opposite"][1] == f"{back[first]} and {back[second]}"


@pytest.mark.parametrize("count", language.FACT_COUNTS)
def test_recall_asks_for_a_fact_that_was_stated_in_an_earlier_turn(count: int) -> None:
    messages, answer = language.exam("recall", random.Random(count), facts=count)
    stated = [line for m in messages[:-1] if m["content"].startswith("Note:") for line in m["content"].split("\n")[1:]]
    assert len(stated) == len({line.split()[0] for line in stated}) == count
    assert answer in stated and messages[-1]["content"].endswith(answer.split()[0])
    assert not messages[-3]["content"].startswith("Note:")
    assert len(language.exam("recall", random.Random(count), count, between=5)[0]) == len(messages) + 2 * 4


def test_exams_are_unseen_in_training() -> None:
    rng = random.Random(0)
    seen = {m["content"] for _ in range(300) for m in language.conversation(rng, 512) if m["role"] == "user"}
    for skill in language.QUESTIONS:
        asked = [language.exam(skill, rng)[0][-1]["content"] for _ in range(50)]
        assert all(language.is_held_out(question) for question in asked) and not seen & set(asked)


def test_the_teacher_is_an_ordinary_folder_and_good_at_its_skills() -> None:
    folder = TINY / "teacher"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    c = model.config
    assert c.model_type == "llama" and c.num_hidden_layers == 8 and c.num_attention_heads >= 2 * c.num_key_value_heads
    assert c.head_dim >= 32 and c.max_position_embeddings >= 1024 and len(tokenizer) <= 2048
    assert demo.mean(demo.score(model, tokenizer, per_skill=16, seed=5)) >= 0.9  # 160 prompts; the folder's note has 400
    assert demo.mean(json.loads((folder / "made_by.json").read_text())["held_out_exact"]) >= 0.95


def test_conversations_are_written_once(tmp_path: Path) -> None:
    path = tmp_path / "data" / "train.jsonl"
    demo.write_conversations(path, rows=3, length=64)
    first = path.read_bytes()
    assert len(first.splitlines()) == 3 and json.loads(first.splitlines()[0])["messages"][0]["role"] == "user"
    demo.write_conversations(path, rows=9, length=64)
    assert path.read_bytes() == first
