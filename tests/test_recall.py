"""Recall tasks against models whose recall is known, perplexity and KL against a direct computation in fp64."""

import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_mt_bench import TEACHER, fails

import llamba
from llamba.base import progress
from llamba.eval import distances, perplexity, recall, texts
from llamba.eval.answerer import Answered, Answerer, Settings
from llamba.eval.commands import main
from llamba.eval.journal import read_lines
from llamba.models.mixers import Mixer


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
    rows = [row for row in read_lines(tmp_path / "scores.jsonl") if not row["benchmark"].endswith("by distance")]
    assert [row["metric"] for row in rows][:2] == ["4 pairs", "10 names"] and len(rows) == 2 + 4
    assert {tuple(row["cell"]) for row in rows[2:]} == {(length, depth) for length in (128, 200) for depth in (0.0, 1.0)}
    assert (tmp_path / "needle.png").read_bytes()[:4] == b"\x89PNG" and "picture" in capsys.readouterr().out
    assert "must be among mqar" in fails(capsys, [*argv, "--tasks", "nothing"])
    assert "--names must be from 1 to 400" in fails(capsys, [*argv, "--names", "500"])


def test_distances_are_those_of_the_texts(teacher: Answerer) -> None:
    """Where the queried key stood, by search; where the number stands, by decoding what is around it."""
    seen: list[list[int]] = []

    class Noting(Lookup):
        def __call__(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            seen.append(ids[0].tolist())
            return super().__call__(ids, use_cache)

    perfect = SimpleNamespace(tokenizer=teacher.tokenizer, context=10_000, model=Noting())
    for trial, ids in zip(recall.mqar_trials(perfect, 12, 2, seed=0), seen, strict=True):
        assert len(trial) == 12 and {asked.value for asked in trial} == {100.0}
        for number, asked in enumerate(trial):
            place = len(ids) - 24 + 2 * number
            assert ids.index(ids[place]) == asked.start and asked.distance == place - (asked.start + 1)
    question, answer = recall.phone_book(20, random.Random(2))
    asked = recall.placed(teacher, question, answer, 0.0)
    ids = teacher.tokenizer(teacher.text(question), add_special_tokens=False)["input_ids"]
    line = teacher.tokenizer.decode(ids[asked.start : len(ids) - asked.distance]).strip()
    assert (
        line.endswith(answer) and line in question.splitlines() and line.startswith(question.rpartition("number of ")[2].partition("?")[0])
    )
    question, answer = recall.needle(teacher, 300, 0.5, random.Random(1), recall.FILLER)
    asked = recall.placed(teacher, question, answer, 0.0)
    ids = teacher.tokenizer(teacher.text(question), add_special_tokens=False)["input_ids"]
    sentence = teacher.tokenizer.decode(ids[asked.start : len(ids) - asked.distance]).strip()
    assert sentence.startswith("The special magic number of") and sentence.endswith(answer)


def test_recall_is_told_by_distance_and_out_of_sight() -> None:
    Asked, sight = distances.Asked, distances.Sight(8, 4)
    trials = {i: [Asked(100.0, 3, 100), Asked(0.0, 50, 7), Asked(0.0, 50, 8), Asked(100.0, 4, 9), Asked(100.0, 60, 1)] for i in range(3)}
    found = distances.by_distance(trials)
    assert {bounds: interval.mean for bounds, interval in found.items()} == {(1, 2): 100, (5, 8): 0, (9, 16): 100, (65, 128): 100}
    unseen = distances.out_of_sight(trials, sight)  # that at a sink and those within the window are seen
    assert unseen is not None and unseen.mean == 50
    assert distances.out_of_sight({0: [Asked(1.0, 2, 100)]}, sight) is None


@pytest.fixture(scope="module")
def windowed(tmp_path_factory) -> str:
    """The embedded teacher with half of its layers converted, a window of 16 and 4 sinks beside the recurrence; its folder."""
    folder = tmp_path_factory.mktemp("windowed") / "student"
    llamba.convert(str(TEACHER), mixer="mamba2", attention=0.5, options={"window": 16, "sinks": 4}).save_pretrained(folder)
    Answerer(str(TEACHER), Settings(device="cpu")).tokenizer.save_pretrained(folder)
    return str(folder)


def test_recall_is_measured_with_the_recurrence_and_without(windowed: str, tmp_path: Path, capsys) -> None:
    asked = ["--pairs", "8", "--names", "10", "--lengths", "128", "--depths", "0.5", "--trials", "2", "--max-new-tokens", "4"]
    main(["recall", windowed, "--out", str(tmp_path), *asked, "--recurrence", "both"])
    text, rows = capsys.readouterr().out, read_lines(tmp_path / "scores.jsonl")
    assert {row["benchmark"] for row in rows} == {f"recall/{task}{by}{off}" for task in recall.TASKS for by in ("", " by distance")
                                                  for off in ("", ", recurrence off")}  # fmt: skip
    assert text.count("wholly beyond window 16 and sinks 4") == 6 and "with the recurrence off" in text and "17 to 32 tokens back" in text
    assert all((tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("needle", "distance"))
    assert "needs a model with recurrent layers" in fails(capsys, ["recall", str(TEACHER), "--out", str(tmp_path), "--recurrence", "both"])


CONVERSATIONS = [
    [
        {"role": "system", "content": "a dog"},
        {"role": "user", "content": "the red cat"},
        {"role": "assistant", "content": "runs and sings"},
    ],
    [{"role": r, "content": c} for r, c in (("user", "big"), ("assistant", "the blue tree"), ("user", "or"), ("assistant", "sleeps " * 9))],
    [{"role": "user", "content": "nobody answers"}],
]


def test_answers_alone_count_whether_the_template_marks_them_or_not(teacher_folder: Path, tmp_path: Path) -> None:
    tokenizer = Answerer(str(teacher_folder), Settings(device="cpu")).tokenizer
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in CONVERSATIONS))
    marked, note = texts.chats(tokenizer, str(path), 100, None)
    assert note == "2 chats of 3 rows, 0 of them cut after a whole answer; 1 without an answer in 100 tokens"
    answers = [tokenizer.decode([text.ids[i] for i in text.targets]) for text in marked]
    assert answers == ["runs and sings</s>", "the blue tree</s>" + "sleeps " * 9 + "</s>"]
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert texts.chats(tokenizer, str(path), 100, None)[0] == marked
    cut, note = texts.chats(tokenizer, str(path), len(marked[1].ids) - 1, None)
    assert tokenizer.decode([cut[1].ids[i] for i in cut[1].targets]) == "the blue tree</s>" and ", 1 of them cut" in note
    assert cut[1].ids[-1] == tokenizer.eos_token_id and len(cut[1].ids) == cut[1].targets[-1] + 1
    assert texts.chats(tokenizer, str(path), 100, 1)[0] == marked[:1]
    with pytest.raises(ValueError, match="of 3 rows none has one"):
        texts.chats(tokenizer, str(path), 3, None)
    path.write_text('{"text": "plain"}\n')
    with pytest.raises(ValueError, match=":1: --chat needs conversations"):
        texts.chats(tokenizer, str(path), 100, None)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        texts.chats(tokenizer, str(path), 100, None)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_chats_by_position_and_without_recurrence_are_those_of_fp64(teacher_folder: Path, tmp_path: Path, capsys) -> None:
    """The recurrence off, in mixers without a window, is a layer that adds nothing."""
    student = llamba.convert(str(teacher_folder), mixer="mamba2", attention=0.5)
    tokenizer = Answerer(str(teacher_folder), Settings(device="cpu")).tokenizer
    for part in (student, tokenizer):
        part.save_pretrained(tmp_path / "student")
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in CONVERSATIONS))
    argv = ["perplexity", str(tmp_path / "student"), "--chat", str(path), "--length", "64", "--out", str(tmp_path / "out")]
    main([*argv, "--teacher", str(teacher_folder), "--recurrence", "both", "--positions", "8", "16"])
    text, found = capsys.readouterr().out, {row["metric"]: row["value"] for row in read_lines(tmp_path / "out/scores.jsonl")}
    teacher, student = Answerer(str(teacher_folder), Settings(device="cpu")).model.double(), student.double().eval()
    read, _ = texts.chats(tokenizer, str(path), 64, None)
    for suffix in ("", ", recurrence off"):
        if suffix:
            for module in student.modules():
                if isinstance(module, Mixer):
                    module.out_proj.weight.data.zero_()
        for where, low, high in (
            ("", 0, 99),
            (", positions 1 to 8", 0, 8),
            (", positions 9 to 16", 8, 16),
            (", after position 16", 16, 99),
        ):
            nll, kl = [], []
            with torch.inference_mode():
                for one in read:
                    p, q = (m(torch.tensor([one.ids])).logits[0].softmax(-1) for m in (teacher, student))
                    for i in (i for i in one.targets if low < i <= high):
                        nll.append(-math.log(q[i - 1, one.ids[i]]))
                        kl.append(float((p[i - 1] * (p[i - 1] / q[i - 1]).log()).sum()))
            named = f"on answers of chats.jsonl{where}{suffix}"
            assert found[f"perplexity {named}"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
            assert found[f"KL to the teacher {named}"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert "2 chats of 3 rows" in text and "the recurrence changes KL, after position 16 by " in text


def test_what_perplexity_cannot_read_is_one_line(windowed: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00")
    argv = ["perplexity", windowed, "--out", str(tmp_path)]
    assert "one of them" in fails(capsys, argv) and "one of them" in fails(capsys, [*argv, "--text", "a", "--chat", "b"])
    assert "must be in UTF-8" in fails(capsys, [*argv, "--text", str(tmp_path / "text.txt")])
    assert "must be a file" in fails(capsys, [*argv, "--text", str(tmp_path / "no.txt")])
    assert "rising numbers" in fails(capsys, [*argv, "--text", "a", "--positions", "8", "4"])
    assert "needs a model with recurrent layers" in fails(
        capsys, ["perplexity", str(TEACHER), *argv[2:], "--text", "a", "--recurrence", "off"]
    )


def test_perplexity_and_kl_are_those_of_fp64(teacher_folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    student = llamba.convert(str(teacher_folder), mixer="mamba2", attention=0.5)
    student.save_pretrained(tmp_path / "student")
    tokenizer = Answerer(str(teacher_folder), Settings(device="cpu")).tokenizer
    tokenizer.save_pretrained(tmp_path / "student")
    text = "the red cat runs and the big dog sings or sleeps " * 12
    (tmp_path / "text.txt").write_text(text)
    argv = ["perplexity", str(tmp_path / "student"), "--text", str(tmp_path / "text.txt"), "--length", "32", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(progress, "EVERY", 0.0)
    main([*argv, "--teacher", str(teacher_folder)])
    assert re.search(r"^perplexity: 1 of \d+ windows, .* left$", capsys.readouterr().err, re.M)
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
    main([*argv[:1], str(teacher_folder), *argv[2:-1], str(tmp_path / "same"), "--teacher", str(teacher_folder), "--bits", "8"])
    low = {row["metric"]: row["value"] for row in read_lines(tmp_path / "same/scores.jsonl")}
    assert 0 < low["KL to the teacher on text.txt, 8-bit weights"] < 0.1 and low["KL to the teacher on text.txt"] == 0
    assert "must have at least" in fails(capsys, [*argv, "--length", "100000"])
