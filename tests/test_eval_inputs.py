"""Files that others made, with every part replaced by something else: each ends in a report, or in one line and status 2."""

import contextlib
import io
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamba.cli import main as llamba_main
from llamba.eval import scores
from llamba.eval.commands import main
from llamba.eval.journal import read_lines
from llamba.eval.stats import Interval

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

ODD: list[Any] = [None, True, -1, math.nan, 1e9, "", "x", [], [[]], {}, {"a": None}, "\ud83d", "9" * 5000]
SINGLE = {"question_id": 81, "model": "m", "judge": ["g", "single-v1"], "turn": 1, "score": 5, "judgment": "y"}
PAIR = {"question_id": 81, "model_1": "a", "model_2": "b", "g1_winner": "tie", "g2_winner": "model_1", "judge": ["g", "p"], "turn": 1}
ANNOTATION = {"instruction": "i", "output_1": "a", "output_2": "b", "generator_1": "gpt4_1106_preview", "generator_2": "m",
              "annotator": "j", "preference": 1.2}  # fmt: skip
ANSWER = {"question_id": 81, "choices": [{"index": 0, "turns": ["a", "b"]}]}


def variants(value: Any) -> Iterator[Any]:
    """The value with itself, and each of its parts at any depth, replaced or left out."""
    yield from ODD
    places: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for place, part in list(places):
        for other in variants(part):
            copy = json.loads(json.dumps(value))
            copy[place] = other
            yield copy
        if isinstance(value, dict):
            yield {key: other for key, other in value.items() if key != place}


def lines(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def judgments(good: dict, name: str) -> Callable[[Path, Any], list[str]]:
    def make(folder: Path, odd: Any) -> list[str]:
        (folder / name).write_text(lines([good, odd]) if name.endswith("l") else json.dumps([good, odd]))
        return ["judgments", str(folder / name), "--data", str(folder), "--out", str(folder / "out")]

    return make


def answers(folder: Path, odd: Any) -> list[str]:
    whole = [ANSWER | {"question_id": row["question_id"]} for row in read_lines(folder / "data/mt_bench/question.jsonl")]
    (folder / "answers.jsonl").write_text(lines([odd, *whole[1:]]))
    return mt_bench(folder)


def mt_bench(folder: Path) -> list[str]:
    asked = ["--judge", "f", "--judge-url", "http://127.0.0.1:9/v1", "--data", str(folder / "data"), "--out", str(folder / "out")]
    return ["mt_bench", str(folder / "answers.jsonl"), *asked, "--estimate"]


def benchmark(name: str) -> Callable[[Path, Any], list[str]]:
    def make(folder: Path, odd: Any) -> list[str]:
        whole = read_lines(folder / "data/mt_bench/question.jsonl")
        (folder / "answers.jsonl").write_text(lines([ANSWER | {"question_id": row["question_id"]} for row in whole]))
        path = folder / "data/mt_bench" / name
        rows = read_lines(path)
        path.write_text(lines([odd, *rows[1:]]))
        return mt_bench(folder)

    return make


def run_folder(folder: Path) -> Path:
    """Scores, items and models of two models."""
    (folder / scores.MODELS).write_text(json.dumps({name: {"path": "p", "attention": a} for name, a in (("m", 0.5), ("n", 1.0))}))
    scores.save(folder, [scores.score("b", "x", name, Interval(1, 0, 2, 5), "j", failed=1, limit=3) for name in "mn"])
    scores.save(
        folder, [scores.score("recall/needle", "c", "m", 5.0, cell=[1, 2.0]), scores.score("lengths", "peak MiB at 5", "m", 1.0, length=5)]
    )
    for name in "mn":
        scores.save_items(folder, "b", name, "j", {"q": [1.0], "r": [2.0]})
    return folder


def reported(name: str, part: int) -> Callable[[Path, Any], list[str]]:
    def make(folder: Path, odd: Any) -> list[str]:
        path = next(run_folder(folder).glob(name))
        rows = path.read_text().splitlines()
        path.write_text("\n".join([*rows[:part], json.dumps(odd), *rows[part + 1 :]]))
        return ["report", str(folder), "--out", str(folder / "together")]

    return make


def score_row(part: int) -> dict:
    row = {"benchmark": "b", "metric": "x", "model": "m", "judge": "j", "value": 1.0, "low": 0, "high": 2, "n": 5, "failed": 1}
    return row | {"command": "c"} | ({"cell": [1, 2.0], "length": 5, "limit": 3} if part else {})


CASES: dict[str, tuple[Callable[[Path, Any], list[str]], Any]] = {
    "single": (judgments(SINGLE, "x_single.jsonl"), SINGLE),
    "pair": (judgments(PAIR, "x_pair.jsonl"), PAIR),
    "annotations": (judgments(ANNOTATION, "annotations.json"), ANNOTATION),
    "answers": (answers, ANSWER),
    "questions": (benchmark("question.jsonl"), {"question_id": 81, "category": "writing", "turns": ["a", "b"]}),
    "references": (benchmark("reference_answer/gpt-4.jsonl"), ANSWER | {"question_id": 101}),
    "scores": (reported(scores.SCORES, 0), score_row(0)),
    "cells": (reported(scores.SCORES, 2), score_row(1) | {"benchmark": "recall/needle"}),
    "models": (reported(scores.MODELS, 0), {"m": {"path": "p", "attention": 0.5}}),
    "items": (reported("items/*.json", 0), {"benchmark": "b", "model": "m", "judge": "j", "values": {"q": [1.0]}}),
}


def ends_well(public_data: Path, folder: Path, kind: str, odd: Any) -> str:
    """ "" if the command reported or refused in a line; else what it did."""
    (folder / "data").mkdir(parents=True)
    if kind in ("answers", "questions", "references"):
        for name in ("question.jsonl", "judge_prompts.jsonl", "reference_answer/gpt-4.jsonl"):
            path = folder / "data/mt_bench" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((public_data / "mt_bench" / name).read_bytes())
    argv = CASES[kind][0](folder, odd)
    out, error, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            (llamba_main if argv[0] == "report" else main)(argv)
        except SystemExit as stopped:
            status = stopped.code  # type: ignore[assignment]
    said = error.getvalue().strip().splitlines()
    refused = status == 2 and said and said[-1].startswith("error: ") and len(said[-1]) < 1000
    return "" if (status == 0 and out.getvalue().strip()) or refused else f"{kind} {json.dumps(odd)[:200]}: {status} {said[-1:]}"


def drawn(kind: str) -> list[Any]:
    found = list(variants(CASES[kind][1]))
    random.Random(kind).shuffle(found)
    return found


@pytest.mark.parametrize("kind", CASES)
def test_odd_files_are_reported_or_refused(public_data: Path, tmp_path: Path, kind: str) -> None:
    assert not [bad for i, odd in enumerate(drawn(kind)[:8]) if (bad := ends_well(public_data, tmp_path / str(i), kind, odd))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_many_odd_files_are_reported_or_refused(public_data: Path, tmp_path: Path, kind: str) -> None:
    assert not [bad for i, odd in enumerate(drawn(kind)[8:60]) if (bad := ends_well(public_data, tmp_path / str(i), kind, odd))]
