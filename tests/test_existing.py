"""Judgments and files that others made: every judge apart, nothing lost in silence, intervals on the scale and without an order."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from fake_judge import fake_judge
from test_alpaca import data as data  # a fixture
from test_alpaca import shortened as shortened  # a fixture
from test_mt_bench import TEACHER, fails

from llamba.eval import alpaca, foreign, harness, stats
from llamba.eval.commands import main
from llamba.eval.fetch import read_json_rows
from llamba.eval.journal import Journal, read_lines, write_lines
from llamba.eval.judgments import read_pairs, read_single

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def single(question: int, turn: int, score: object, model: str = "m", judge: object = ("gpt-4", "single-v1")) -> dict:
    return {"question_id": question, "model": model, "judge": judge, "turn": turn, "score": score}


def game(question: int, first: str, second: str, model_1: str = "a", model_2: str = "b", judge: str = "gpt-4", turn: int = 1) -> dict:
    winners = {"g1_winner": first, "g2_winner": second}
    return {"question_id": question, "model_1": model_1, "model_2": model_2, "judge": [judge, "pair-v2"], "turn": turn} | winners


def printed(capsys, *argv: str) -> str:
    capsys.readouterr()
    main(["judgments", *argv])
    return capsys.readouterr().out


def test_two_judges_in_one_file_are_two_tables(tmp_path: Path, capsys) -> None:
    path = tmp_path / "mixed_single.jsonl"
    rows = [single(q, t, 8.0) for q in range(4) for t in (1, 2)]
    write_lines(path, [*rows, *(row | {"judge": ["other", "single-v1"], "score": 2.0} for row in rows)])
    text = printed(capsys, str(path), "--data", str(tmp_path))
    assert "of m, judged by gpt-4\n  average       8.00" in text and "of m, judged by other\n  average       2.00" in text
    assert "5.00" not in text and "no categories: " in text


def test_failures_and_whole_models_are_said_and_the_last_line_counts(tmp_path: Path, capsys) -> None:
    path = tmp_path / "gpt-4_single.jsonl"
    odd = [-1, math.nan, math.inf, 1e9, -5, "7", None, True, [7]]
    rows = [single(q, 1, 6.0) for q in range(4)] + [single(10 + i, 1, value) for i, value in enumerate(odd)] + [single(1, 1, -1, "silent")]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, single(99, 1, 9.0)]))  # no newline at the end
    text = printed(capsys, str(path), "--data", str(tmp_path))
    assert "average       6.60  [ 6.00,  7.80]  5 questions" in text
    assert "9 judgments failed (8: a score that is no number from 0 to 10, 1: no rating)" in text
    assert "MT-Bench of silent, judged by gpt-4\n  1 judgments failed (1: no rating)\n  nothing could be read" in text


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ("{", "line 2 must be JSON"), ("[1]", "line 2 must be a JSON object, got [1]"), ("NaN", "line 2 must be a JSON object, got nan"),
        (json.dumps(single(1, 1, 5) | {"model": 3}), "line 2 must have a text under 'model', got 3"),
        (json.dumps(single(1, 1, 5) | {"question_id": [1]}), "line 2 must have a name or a number under 'question_id'"),
        (json.dumps(single(1, 0, 5)), "line 2 must have a turn"),
        (json.dumps(single(1, 1, 5) | {"judge": {}}), "line 2 must have its judge"),
        (json.dumps({"question_id": 1}), "line 2 must hold one of FastChat's single judgments"), ("[" * 100_000, "line 2 must be JSON"),
        ("\udcff", "must be text in UTF-8"),
    ],
)  # fmt: skip
def test_what_is_no_judgment_is_one_line(tmp_path: Path, capsys, broken: str, what: str) -> None:
    path = tmp_path / "x_single.jsonl"
    path.write_bytes((json.dumps(single(1, 1, 5)) + "\n" + broken).encode(errors="surrogateescape"))
    assert what in fails(capsys, ["judgments", str(path)])
    path.write_text("")
    assert "must hold judgments, and is empty" in fails(capsys, ["judgments", str(path)])
    assert "is not there" in fails(capsys, ["judgments", str(tmp_path / "no")])
    (tmp_path / "empty").mkdir()
    assert "holds none" in fails(capsys, ["judgments", str(tmp_path / "empty")])


def test_pairs_come_in_whatever_the_order_of_names(tmp_path: Path, capsys) -> None:
    rows = [
        game(1, "model_1", "model_1"),
        game(2, "model_2", "model_2"),
        game(3, "model_1", "tie"),
        game(4, "error", "model_1"),
        game(5, "x", "tie"),
    ]
    rows += [game(6, "model_2", "model_2", "b", "a"), game(1, "model_2", "model_2", judge="other"), game(7, "model_1", "tie", "b", "a")]
    path = tmp_path / "gpt-4_pair.jsonl"
    write_lines(path, rows)
    first, other = read_pairs([path])
    assert {row["model_1"] for row in first.rows} == {"a"} and len(first.rows) == 5 and len(first.failed) == 2 and len(other.rows) == 1
    turned = next(row for row in first.rows if row["question_id"] == 7)
    assert (turned["g1_winner"], turned["g2_winner"]) == ("tie", "model_2")  # b was shown first in game 1, so that a is in game 2
    text = printed(capsys, str(path), "--data", str(tmp_path))
    assert (
        "a against b\n  win rate     60.00 [" in text
        and "2 judgments failed" in text
        and "judged by other: a against b\n  win rate     0.00" in text
    )
    write_lines(path, [game(1, "tie", "tie", "a", "a")])
    assert "must compare two models" in fails(capsys, ["judgments", str(path)])


def test_a_fastchat_folder_becomes_scores_beside_ones_own(public_data: Path, tmp_path: Path, capsys) -> None:
    """Our own judgments as if another had made them: the same averages, and a paired difference beside our own run."""
    answers = tmp_path / "short.jsonl"
    questions = read_lines(public_data / "mt_bench/question.jsonl")
    write_lines(answers, [{"question_id": q["question_id"], "choices": [{"index": 0, "turns": ["Yes.", "No."]}]} for q in questions])
    own, theirs = tmp_path / "own", tmp_path / "theirs/data/mt_bench/model_judgment"
    with fake_judge() as (url, _):
        main(["mt_bench", str(answers), "--judge", "fake", "--judge-url", url, "--data", str(public_data), "--out", str(own)])
    (made,) = (own / "data/mt_bench/model_judgment").glob("*_single.jsonl")
    rows = [row | {"model": "org/other", "score": min(10, row["score"] + 1)} for row in read_lines(made)]
    random.Random(0).shuffle(rows)
    write_lines(theirs / "fake_single.jsonl", rows)
    write_lines(theirs / "fake_pair.jsonl", [game(q["question_id"], "model_1", "model_1", "org/other", "x", "fake") for q in questions])
    text = printed(capsys, str(tmp_path / "theirs"), "--out", str(own), "--data", str(public_data))
    ours = {(r["model"], r["metric"], r["judge"]): r for r in read_lines(own / "scores.jsonl")}
    mean = float(np.mean([row["score"] for row in rows]))
    assert ours["org/other", "average", "fake"]["value"] == pytest.approx(mean) and f"average      {mean:5.2f}" in text
    assert ours["org/other", "average", "fake"]["from_file"] == "theirs" and "coding" in text
    assert ours["org/other", "win rate against x", "fake"]["value"] == 100
    gap = np.mean([row["score"] for row in read_lines(made)]) - mean
    assert f"mt_bench: short - org/other = {gap:.2f} [" in text and "both judges are called fake" in text
    write_lines(theirs / made.name, rows)  # under our own file name the judge is ours, whole
    (theirs / "fake_single.jsonl").unlink()
    text = printed(capsys, str(tmp_path / "theirs"), "--out", str(tmp_path / "again"), "--data", str(public_data))
    assert f"judged by {made.stem.removesuffix('_single')}\n" in text


def annotation(instruction: str, preference: object, **more: object) -> dict:
    row = {"instruction": instruction, "output_1": "a b", "output_2": "c", "generator_1": "gpt4_1106_preview", "generator_2": "m"}
    return row | {"annotator": "j", "preference": preference} | more


def test_annotations_come_in(tmp_path: Path, capsys) -> None:
    rows = [annotation(str(i), value) for i, value in enumerate((1, 2, 1.5, 0, 1.25, None, -1, 3, math.nan, "2"))]
    rows += [
        annotation("0", 2),
        annotation("0", 1, annotator="k"),
        annotation("0", 2, generator_1="base"),
        annotation("0", None, generator_2="n"),
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    text = printed(capsys, str(path), "--out", str(tmp_path / "out"))
    found = {(r["model"], r["metric"], r["judge"]): r for r in read_lines(tmp_path / "out/scores.jsonl")}
    assert found["m", "win rate", "j"]["value"] == 100 * (1 + 1 + 0.5 + 0.5 + 0.25) / 5 and found["m", "win rate", "j"]["failed"] == 5
    assert found["m", "win rate", "k"]["value"] == 0 and found["m", "win rate against base", "j"]["value"] == 100 and len(found) == 3
    assert "5 judged, 5 failed, 1 stood there twice; no length-controlled win rate: " in text
    assert "AlpacaEval 2 of n, judged by j: none of 1 judgments could be read" in text
    path.write_text(json.dumps([{"preference": 1, "annotator": "j"}]))
    assert "row 1 must have a text under 'generator_2'" in fails(capsys, ["judgments", str(path)])


def test_annotations_of_all_instructions_have_a_length_controlled_win_rate(
    data: Path, shortened: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """In any order, as alpaca_eval has it of the official one."""
    import pandas as pd

    reference, outputs = json.loads((data / alpaca.REFERENCE).read_text()), json.loads(shortened.read_text())
    rng = np.random.default_rng(0)
    rows = [
        annotation(r["instruction"], 1 + float(rng.uniform()), output_1=r["output"], output_2=o["output"])
        for r, o in zip(reference, outputs, strict=True)
    ]
    alpaca.package()
    from alpaca_eval.metrics import glm_winrate

    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda filename, **kwargs: str(data / alpaca.GAMED))
    with alpaca._quiet():
        own = glm_winrate.get_length_controlled_winrate(pd.DataFrame(rows), save_weights_dir=None)
    random.Random(1).shuffle(rows)
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    monkeypatch.setattr(stats.refit_interval, "__defaults__", (0, 4))
    printed(capsys, str(tmp_path), "--out", str(tmp_path / "out"), "--data", str(data))
    found = {row["metric"]: row["value"] for row in read_lines(tmp_path / "out/scores.jsonl")}
    assert found["length-controlled win rate"] == pytest.approx(own["length_controlled_winrate"], abs=1e-6)
    assert found["win rate"] == pytest.approx(own["win_rate"], abs=1e-9)


def test_intervals_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    values = {q: list(rng.integers(1, 11, size=1 + q % 3).astype(float)) for q in range(80)}
    other = dict(sorted(values.items(), key=lambda item: -item[0]))
    assert stats.bootstrap(values) == stats.bootstrap(other) == stats.bootstrap({f"q{q}": v[::-1] for q, v in other.items()})
    assert stats.paired(values, {q: [5.0] for q in values}) == stats.paired(other, {q: [5.0] for q in values})
    rows = [single(q, turn, float(rng.integers(1, 11))) for q in range(40) for turn in (1, 2)]
    for name in ("a", "b"):
        write_lines(tmp_path / f"{name}_single.jsonl", rows)
        random.Random(0).shuffle(rows)
    (a,), (b,) = (read_single([tmp_path / f"{name}_single.jsonl"]) for name in ("a", "b"))
    assert stats.bootstrap(a.of("m")) == stats.bootstrap(b.of("m"))


def test_intervals_stay_on_the_scale() -> None:
    """Wilson's against its published values (Newcombe 1998, table I: 81/263 and 0/20), and lm-eval's that left it (90 [70.4, 109.6])."""
    assert stats.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert stats.wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    right = stats.share({i: [100.0 * (i > 0)] for i in range(10)})
    assert right.mean == 90 and 55 < right.low < right.high < 98.3 and stats.share({0: [100.0]}).high == 100
    between = stats.share({i: [99.0 + i % 2] for i in range(10)})
    assert 99 <= between.low <= between.high <= 100
    alike, mixed = stats.share({i: [0.0, 0.0] for i in range(20)}), {i: [0.0, 100.0 * i] for i in range(2)}
    assert (alike.mean, alike.low, alike.n) == (0.0, 0.0, 20) and alike.high == pytest.approx(16.11, abs=5e-3)
    assert stats.share(mixed) == stats.bootstrap(mixed)
    rows = {str(q): [100.0 * (q > 0)] for q in range(10)}
    results = {
        "results": {"t": {"acc,none": 0.9, "acc_stderr,none": 0.1, "perplexity,none": 2.0, "perplexity_stderr,none": 5.0,
                          "bleu_acc,none": 1.0, "bleu_acc_stderr,none": 0.0, "other,none": 3, "other_stderr,none": "N/A"}},
        "n-samples": {"t": {"effective": 10}},
    }  # fmt: skip
    for given in (None, {("t", "acc"): rows}):
        found = {row["metric"]: row for row in harness._rows(results, "m", "s", given)}
        assert (found["acc"]["low"], found["acc"]["high"]) == pytest.approx((right.low, right.high)) and found["acc"]["n"] == 10
        assert 1 <= found["perplexity"]["low"] < 2 < found["perplexity"]["high"]
        assert found["bleu_acc"]["value"] == 100 == found["bleu_acc"]["high"] and found["bleu_acc"]["low"] > 70
        assert found["other"]["value"] == 3 and "low" not in found["other"]


def test_a_last_line_counts_if_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert read_lines(path) == [{"a": 1}, {"a": 2}] == read_json_rows(path)
    with Journal(path) as journal:
        journal.append({"a": 3})
    assert read_lines(path) == [{"a": 1}, {"a": 2}, {"a": 3}]
    path.write_text('\ufeff{"a": "x\u2028y\x85z"}\r\n\r\n{"a": 2}\r\n')  # separators that are no line ends in JSON lines
    assert read_json_rows(path) == [{"a": "x\u2028y\x85z"}, {"a": 2}]
    with pytest.raises(ValueError, match="line 2 must be JSON"):
        (tmp_path / "torn.jsonl").write_text('{"a": 1}\n{"a": ')
        foreign.rows(tmp_path / "torn.jsonl")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({}, "choices[0].turns"),
        ({"question_id": 81, "choices": []}, "choices[0].turns"),
        ({"choices": [{"turns": ["a", "b"]}]}, "'question_id'"),
        ({"question_id": 81, "choices": [{"turns": ["a"]}]}, "at least 2 texts"),
        ({"question_id": 81, "choices": [{"turns": "ab"}]}, "at least 2"),
        ({"question_id": 81, "choices": [{"turns": ["a", "b"]}]}, "must answer every question"),
    ],
)  # fmt: skip
def test_answers_that_are_none_are_one_line(public_data: Path, tmp_path: Path, capsys, row: dict, what: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row))
    asked = ["--judge", "fake", "--judge-url", "http://127.0.0.1:9/v1", "--data", str(public_data), "--out", str(tmp_path)]
    assert what in fails(capsys, ["mt_bench", str(path), *asked])


def test_benchmark_files_that_are_none_are_one_line(public_data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "mt_bench/reference_answer").mkdir(parents=True)
    for name in ("question.jsonl", "judge_prompts.jsonl", "reference_answer/gpt-4.jsonl"):
        (tmp_path / "mt_bench" / name).write_bytes((public_data / "mt_bench" / name).read_bytes())
    answers = tmp_path / "a.jsonl"
    questions = read_lines(public_data / "mt_bench/question.jsonl")
    write_lines(answers, [{"question_id": q["question_id"], "choices": [{"index": 0, "turns": ["Yes.", "No."]}]} for q in questions])
    argv = [
        "mt_bench",
        str(answers),
        "--judge",
        "fake",
        "--judge-url",
        "http://127.0.0.1:9/v1",
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "o"),
    ]
    for name, change, what in (
        ("question.jsonl", lambda rows: [rows[0] | {"turns": ["one"]}, *rows[1:]], "line 1 must have two turns"),
        ("question.jsonl", lambda rows: [rows[0], *rows], "each must stand there once"),
        ("question.jsonl", lambda rows: [rows[0] | {"category": None}], "a text under 'category'"),
        ("judge_prompts.jsonl", lambda rows: rows[:3], "must hold FastChat's judge prompts"),
        ("reference_answer/gpt-4.jsonl", lambda rows: rows[:3], "must answer every question of math"),
    ):
        path = tmp_path / "mt_bench" / name
        whole = path.read_bytes()
        write_lines(path, change(read_lines(path)))
        assert what in fails(capsys, argv), what
        path.write_bytes(whole)
    assert "nothing answers" in fails(capsys, argv)


def test_names_that_read_alike_in_file_names_stay_apart(tmp_path: Path, capsys) -> None:
    path = tmp_path / "j_single.jsonl"
    write_lines(path, [single(q, 1, float(q), model) for q in range(3) for model in ("a/b", "a_b")])
    printed(capsys, str(path), "--out", str(tmp_path / "out"), "--data", str(tmp_path))
    printed(capsys, str(path), "--out", str(tmp_path / "out"), "--data", str(tmp_path))
    assert sorted(json.loads(item.read_text())["model"] for item in (tmp_path / "out/items").iterdir()) == ["a/b", "a_b"]


def test_what_is_beyond_the_context_is_not_measured(tmp_path: Path, capsys) -> None:
    asked = ["--pairs", "4", "400", "--names", "10", "300", "--lengths", "128", "1100", "9000", "--depths", "0", "--trials", "1"]
    main(["recall", str(TEACHER), "--out", str(tmp_path), "--max-new-tokens", "4", *asked])
    text, rows = capsys.readouterr().out, read_lines(tmp_path / "scores.jsonl")
    assert [row["metric"] for row in rows if "cell" in row] == ["4 pairs", "10 names", "128 tokens, depth 0.0"]
    assert text.count("not measured: beyond the model's context of 1024") == 4
    assert "everything asked for is beyond" in fails(
        capsys, ["recall", str(TEACHER), "--out", str(tmp_path), "--tasks", "mqar", "--pairs", "900"]
    )
    hay = tmp_path / "hay.txt"
    hay.write_bytes(b"\xff\xfe")
    needle = ["recall", str(TEACHER), "--out", str(tmp_path), "--tasks", "needle", "--haystack", str(hay)]
    assert "must be text in UTF-8" in fails(capsys, needle)
    hay.write_text(" ")
    assert "is empty" in fails(capsys, needle)
