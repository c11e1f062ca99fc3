"""Recall tasks against models whose recall is known, perplexity and KL against a direct computation in fp64."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_mt_bench import TEACHER, fails

import llamba
from llamba.eval import perplexity, recall
from llamba.eval.answerer import Answered, Answerer, Settings
from llamba.eval.commands import main
from llamba.eval.journal import read_lines


class Lookup:
    """A language model that answers every repeated token with what followed it first: perfect associative recall."""

    device = torch.device("cpu")

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        row = ids[0].tolist()
        logits = torch.zeros(1, len(row), 2000)
        for place, token in enumerate(row):
            logits[0, place, row[row.index(token) + 1] if row.index(token) < place else 0] = 1
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def teacher() -> Answerer:
    return Answerer(str(TEACHER), Settings(batch=4, max_new_tokens=8, device="cpu"))


def test_associative_recall_is_100_for_a_lookup_and_chance_for_a_model_that_knows_nothing(teacher: Answerer) -> None:
    perfect = SimpleNamespace(tokenizer=teacher.tokenizer, context=10_000, model=Lookup())
    assert recall.mqar(perfect, 32, 3, seed=0) == [100.0] * 3
    perfect.model = lambda ids, use_cache: SimpleNamespace(logits=torch.zeros(1, ids.shape[1], 2000))
    perfect.model.device = torch.device("cpu")
    assert max(recall.mqar(perfect, 32, 3, seed=0)) < 10
    with pytest.raises(ValueError, match="need a context of 4001"):
        recall.mqar(teacher, 1000, 1, seed=0)


def test_needle_and_phone_book_say_what_they_ask(teacher: Answerer) -> None:
    tokens = []
    for depth in (0.0, 0.5, 1.0):
        question, answer = recall.needle(teacher, 400, depth, random.Random(1), recall.FILLER)
        sentence = next(part for part in question.split(". ") if answer in part)
        before = question.index(sentence) / (len(question) - len(sentence) - 90)
        assert abs(before - depth) < 0.1 and question.count(answer) == 1
        tokens.append(len(teacher.tokenizer.apply_chat_template([{"role": "user", "content": question}])["input_ids"]))
    assert all(330 <= n <= 410 for n in tokens)
    question, answer = recall.phone_book(50, random.Random(2))
    asked = question.rpartition("number of ")[2].partition("?")[0]
    assert f"\n{asked}: {answer}\n" in question and question.count("\n") == 51 and len(set(question.splitlines())) == 52


def test_an_answer_counts_if_the_number_stands_in_it(teacher: Answerer, monkeypatch) -> None:
    said = iter(["It is 12345.", "1 2 3 4 5", "12,345", "none", "1234"])
    monkeypatch.setattr(Answerer, "__call__", lambda self, chats, *args: [Answered(next(said), 1, "end") for _ in chats])
    assert recall._ask(teacher, [("?", "12345")] * 5) == [100.0, 100.0, 100.0, 0.0, 0.0]


def test_the_command_measures_every_cell_and_draws_the_heat_map(tmp_path: Path, capsys) -> None:
    argv = [
        "recall",
        str(TEACHER),
        "--out",
        str(tmp_path),
        "--pairs",
        "4",
        "--names",
        "10",
        "--lengths",
        "128",
        "200",
        "--depths",
        "0",
        "1",
    ]
    main([*argv, "--trials", "2", "--max-new-tokens", "4"])
    rows = read_lines(tmp_path / "scores.jsonl")
    assert [row["metric"] for row in rows][:2] == ["4 pairs", "10 names"] and len(rows) == 2 + 4
    assert {tuple(row["cell"]) for row in rows[2:]} == {(length, depth) for length in (128, 200) for depth in (0.0, 1.0)}
    assert (tmp_path / "needle.png").read_bytes()[:4] == b"\x89PNG" and "picture" in capsys.readouterr().out
    assert "must be among mqar" in fails(capsys, [*argv, "--tasks", "nothing"])
    assert "--names must be from 1 to 400" in fails(capsys, [*argv, "--names", "500"])


def test_perplexity_and_kl_are_those_of_fp64(teacher_folder: Path, tmp_path: Path, capsys) -> None:
    student = llamba.convert(str(teacher_folder), mixer="mamba2", attention=0.5)
    student.save_pretrained(tmp_path / "student")
    tokenizer = Answerer(str(teacher_folder), Settings(device="cpu")).tokenizer
    tokenizer.save_pretrained(tmp_path / "student")
    text = "the red cat runs and the big dog sings or sleeps " * 12
    (tmp_path / "text.txt").write_text(text)
    argv = ["perplexity", str(tmp_path / "student"), "--text", str(tmp_path / "text.txt"), "--length", "32", "--out", str(tmp_path / "out")]
    main([*argv, "--teacher", str(teacher_folder)])
    found = {row["metric"].split(" on ")[0]: row for row in read_lines(tmp_path / "out/scores.jsonl")}
    windows = perplexity.windows_of(tokenizer, text, 32, None)
    assert all(len(ids) == 33 and ids[0] == tokenizer.bos_token_id for ids in windows)
    nll, kl = [], []
    teacher, student = Answerer(str(teacher_folder), Settings(device="cpu")).model.double(), student.double().eval()
    with torch.inference_mode():
        for ids in windows:
            p, q = (m(torch.tensor([ids])).logits[0, :-1].softmax(-1) for m in (teacher, student))
            nll += [-math.log(q[i, t]) for i, t in enumerate(ids[1:])]
            kl += (p * (p / q).log()).sum(-1).tolist()
    assert found["perplexity"]["value"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    assert found["KL to the teacher"]["value"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    main([*argv[:1], str(teacher_folder), *argv[2:-1], str(tmp_path / "same"), "--teacher", str(teacher_folder)])
    same = {row["metric"].split(" on ")[0]: row["value"] for row in read_lines(tmp_path / "same/scores.jsonl")}
    assert same["KL to the teacher"] == 0 and same["same choice as the teacher"] == 100
    assert "must have at least" in fails(capsys, [*argv, "--length", "100000"])
