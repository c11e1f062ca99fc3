"""Answers: batched, resumable, independent of neighbours and speculation; and the statistics over them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llamba.eval import stats
from llamba.eval.answerer import Answerer, Gumbel, Settings
from llamba.eval.answers import Question, answer_all, fingerprint
from llamba.eval.journal import read_lines, write_lines

QUESTIONS = [Question(i, tuple(f"the {w} cat" for w in ("red", "big")[: 1 + i % 2]), 0.7 * (i % 3 > 0)) for i in range(7)]
CPU = {"max_new_tokens": 6, "device": "cpu"}


def plain(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "tstamp"} for row in rows]


def test_an_interrupted_run_repeats_whole_batches(teacher_folder: Path, tmp_path: Path) -> None:
    settings = Settings(batch=3, **CPU)
    whole = answer_all(str(teacher_folder), "m", QUESTIONS, settings, tmp_path / "a.jsonl")
    assert [row["question_id"] for row in whole] == list(range(7)) and len(whole[1]["choices"][0]["turns"]) == 2
    write_lines(tmp_path / "b.jsonl", whole[:1])
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"question_id": 1, "tor')
    assert plain(answer_all(str(teacher_folder), "m", QUESTIONS, settings, tmp_path / "b.jsonl")) == plain(whole)
    with pytest.raises(ValueError, match="other settings"):
        answer_all(str(teacher_folder), "m", QUESTIONS, Settings(batch=3, seed=1, **CPU), tmp_path / "a.jsonl")
    assert plain(read_lines(tmp_path / "a.jsonl")) == plain(whole)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, small, tokenizer) -> str:
    """A draft that is often wrong: other weights, one layer, a shorter context."""
    folder = tmp_path_factory.mktemp("draft")
    draft = small.llama(len(tokenizer), seed=1, num_hidden_layers=1)
    draft.config.max_position_embeddings = 40
    draft.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_answers_do_not_depend_on_batch_or_draft(teacher_folder: Path, student_folder: str, other_folder: str) -> None:
    """Greedy and sampled rows of unequal lengths, some near the end of the context, two alike but for their seed."""
    chats = [[{"role": "user", "content": q.turns[0]}] for q in QUESTIONS]
    chats += [[{"role": "user", "content": "the " * 12}], [{"role": "user", "content": QUESTIONS[1].turns[0]}]]
    temperatures, seeds = [*(q.temperature for q in QUESTIONS), 0.7, 0.7], [str(i) for i in range(len(chats))]
    for model, drafts in ((str(teacher_folder), (str(teacher_folder), other_folder)), (student_folder, (other_folder, "lookup"))):
        answerer = Answerer(model, Settings(max_new_tokens=24, device="cpu"))
        answerer.context = 48
        together = answerer(chats, temperatures, seeds)
        alone = [answerer([c], [t], [s])[0] for c, t, s in zip(chats, temperatures, seeds, strict=True)]
        assert together == alone and together[1] != together[-1] and len({answer.tokens for answer in together}) > 1
        for draft in drafts:
            drafted = Answerer(model, Settings(max_new_tokens=24, device="cpu", draft=draft))
            drafted.context = 48
            assert drafted(chats, temperatures, seeds) == together
            assert 0 < drafted.drafted and (drafted.accepted < drafted.drafted or draft == model)
    assert answerer(chats, temperatures, [f"{s}x" for s in seeds]) != together


def test_a_draft_is_part_of_what_made_answers(teacher_folder: Path, other_folder: str, tmp_path: Path) -> None:
    settings = Settings(batch=3, **CPU)
    whole = answer_all(str(teacher_folder), "m", QUESTIONS, settings, tmp_path / "a.jsonl")
    drafted = answer_all(str(teacher_folder), "m", QUESTIONS, Settings(batch=3, draft=other_folder, **CPU), tmp_path / "b.jsonl")
    assert [row["choices"] for row in drafted] == [row["choices"] for row in whole]
    with pytest.raises(ValueError, match="other settings"):
        answer_all(str(teacher_folder), "m", QUESTIONS, settings, tmp_path / "b.jsonl")


def test_fewer_questions_leave_the_other_answers(teacher_folder: Path, tmp_path: Path) -> None:
    settings = Settings(batch=3, **CPU)
    whole = answer_all(str(teacher_folder), "m", QUESTIONS, settings, tmp_path / "a.jsonl")
    assert answer_all(str(teacher_folder), "m", QUESTIONS[:2], settings, tmp_path / "a.jsonl") == whole[:2]
    assert read_lines(tmp_path / "a.jsonl") == whole


def test_gumbel_draws_from_the_softmax() -> None:
    scores, number = torch.tensor([[1.0, 0.0, 2.0, -1.0]]), 4000
    drawn = torch.stack([Gumbel([0.5], [str(s)], 0)(torch.zeros(1, 3, dtype=torch.long), scores).argmax(-1) for s in range(number)])
    counts = torch.bincount(drawn.flatten(), minlength=4).double()
    expected = (scores[0].double() / 0.5).softmax(0) * number
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, 0.1%
    assert torch.equal(Gumbel([0.0], ["x"], 0)(torch.zeros(1, 3, dtype=torch.long), scores), scores)


def test_a_prompt_that_does_not_fit_is_an_empty_answer_and_said(teacher_folder: Path) -> None:
    answerer = Answerer(str(teacher_folder), Settings(**CPU))
    answerer.context = 24
    long, short = [{"role": "user", "content": "the " * 80}], [{"role": "user", "content": "cat"}]
    answers = answerer([long, short], [0, 0], ["a", "b"], max_new_tokens=500)
    assert answers[0] == type(answers[0])("", 0, "context") and answers[1].stopped in ("end", "context")
    assert answers[1].tokens < 24


def test_fingerprints_tell_models_apart(teacher_folder: Path, tmp_path: Path) -> None:
    weights = (teacher_folder / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_bytes((teacher_folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert fingerprint(str(tmp_path)) == fingerprint(str(teacher_folder))
    (tmp_path / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert fingerprint(str(tmp_path)) != fingerprint(str(teacher_folder))


def test_bootstrap_has_its_coverage_and_keeps_turns_together() -> None:
    """Of 200 samples of 80 questions with two equal turns, about 95% of the intervals hold the true mean."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        values = {q: [v, v] for q, v in enumerate(rng.normal(3.0, 1.0, 80))}
        interval = stats.bootstrap(values, seed, resamples=400)
        held += interval.low <= 3.0 <= interval.high
    assert 180 <= held <= 199  # 95%, binomial
    width = interval.high - interval.low
    assert width == pytest.approx(2 * 1.96 / math.sqrt(80), rel=0.25)  # not that of 160 values


def test_paired_differences_are_narrower_where_questions_decide() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(5, 2, 80)
    first = {q: [hard[q] + rng.normal(0.3, 0.3)] for q in range(80)}
    second = {q: [hard[q] + rng.normal(0, 0.3)] for q in range(60)}
    found = stats.paired(first, second)
    assert found.difference.n == 60 and found.better + found.worse + found.equal == 60 and found.difference.low > 0
    assert found.difference.high - found.difference.low < 0.4 * (stats.bootstrap(first).high - stats.bootstrap(first).low)
    with pytest.raises(ValueError, match="both models"):
        stats.paired(first, {99: [1.0]})
    with pytest.raises(ValueError, match="at least one question"):
        stats.bootstrap({1: []})


def test_a_refit_interval_of_a_mean_is_the_bootstrap_of_the_mean() -> None:
    values = np.random.default_rng(2).normal(0, 1, 200)
    fitted = stats.refit_interval(200, lambda drawn: float(values.mean() if drawn is None else values[drawn].mean()), resamples=2000)
    plain = stats.bootstrap({i: [v] for i, v in enumerate(values)})
    assert fitted.mean == pytest.approx(plain.mean) and fitted.low == pytest.approx(plain.low, abs=0.02)
