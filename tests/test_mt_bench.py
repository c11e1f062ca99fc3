"""MT-Bench with a fake judge: FastChat reads the files, nothing is asked twice, faults change no other score, errors are one line."""

import contextlib
import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
from fake_judge import ODD, UNREADABLE, Faults, fake_judge
from fake_judge import reply as good_reply
from transformers import AutoTokenizer

import llamba
from llamba.eval import commands, scores
from llamba.eval.commands import main
from llamba.eval.journal import Journal, read_lines, write_lines
from llamba.eval.judge import Endpoint, Failure, Judge, JudgeClient, Request, escape
from llamba.eval.judgments import read_single, report_single
from llamba.eval.local_judge import transport
from llamba.eval.replies import plain_ratings, read_reply, validated, without_thoughts

ROOT = Path(__file__).parent.parent
TEACHER = ROOT / "recipes" / "tiny" / "teacher"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


_FOLDERS = tempfile.TemporaryDirectory()


@functools.cache
def student() -> str:
    """The embedded teacher with half of its attention layers converted, as a folder."""
    folder = Path(_FOLDERS.name) / "student"
    llamba.convert(str(TEACHER), mixer="mamba2", attention=0.5).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(folder)
    return str(folder)


def arguments(data: Path, out: Path, url: str, *more: str) -> list[str]:
    asked = ["--judge", "fake", "--judge-url", url, "--data", str(data), "--out", str(out), "--max-new-tokens", "8", "--limit", "16"]
    return ["mt_bench", student(), *asked, *more]


def stable(path: Path) -> list[str]:
    """A file's rows without what may differ between runs."""
    return sorted(json.dumps({k: v for k, v in row.items() if k not in ("tstamp", "time")}) for row in read_lines(path))


def judgments(out: Path, kind: str = "single") -> Path:
    return next(path for path in (out / "data/mt_bench/model_judgment").glob(f"*_{kind}.jsonl"))


def fails(capsys, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.fixture(scope="module")
def answered(public_data: Path, tmp_path_factory) -> Path:
    """A finished run without faults: its folder."""
    out = tmp_path_factory.mktemp("clean")
    with fake_judge() as (url, state):
        main(arguments(public_data, out, url))
        assert state.requests == 32
    return out


def copy_answers(answered: Path, out: Path) -> None:
    target = out / "data/mt_bench/model_answer"
    target.mkdir(parents=True)
    for path in (answered / "data/mt_bench/model_answer").iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_a_rerun_judges_nothing_and_changes_nothing(public_data: Path, answered: Path, tmp_path: Path, capsys) -> None:
    copy_answers(answered, tmp_path)
    with fake_judge() as (url, state):
        main(arguments(public_data, tmp_path, url))
        first, asked = stable(judgments(tmp_path)), state.requests
        main(arguments(public_data, tmp_path, url))
        assert state.requests == asked == 32
    assert stable(judgments(tmp_path)) == first and len(first) == 32
    assert "0 of 32 judgments to ask for" in capsys.readouterr().out


def test_show_result_prints_our_averages(public_data: Path, answered: Path) -> None:
    command = [sys.executable, "-m", "fastchat.llm_judge.show_result", "--input-file", str(judgments(answered))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=answered)
    assert done.returncode == 0, done.stderr
    shown = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("student")]
    ours = {row["metric"]: row["value"] for row in read_lines(answered / "scores.jsonl")}
    assert shown == pytest.approx([ours["turn 1"], ours["turn 2"], ours["average"]], abs=1e-6)
    row = read_lines(answered / "scores.jsonl")[0]
    assert row["judge_is"]["model"] == "fake" and {"commit", "command", "versions", "hardware", "date"} <= set(row)


def test_prompts_are_fastchats_own(public_data: Path, answered: Path) -> None:
    """The text that the judge saw, against the templates filled in by hand."""
    prompts = {row["name"]: row for row in read_lines(public_data / "mt_bench/judge_prompts.jsonl")}
    questions = {row["question_id"]: row for row in read_lines(public_data / "mt_bench/question.jsonl")}
    answers = {row["question_id"]: row["choices"][0]["turns"] for row in read_lines(answered / "data/mt_bench/model_answer/student.jsonl")}
    rows = {(row["question_id"], row["turn"]): row for row in read_lines(judgments(answered))}
    writing = rows[81, 1]
    assert writing["judge"] == ["fake", "single-v1"]
    assert writing["user_prompt"] == prompts["single-v1"]["prompt_template"].format(
        question=questions[81]["turns"][0], answer=answers[81][0]
    )
    reference = {row["question_id"]: row for row in read_lines(public_data / "mt_bench/reference_answer/gpt-4.jsonl")}[101]["choices"][0][
        "turns"
    ]
    filled = prompts["single-math-v1-multi-turn"]["prompt_template"].format(
        question_1=questions[101]["turns"][0], question_2=questions[101]["turns"][1], answer_1=answers[101][0], answer_2=answers[101][1],
        ref_answer_1=reference[0], ref_answer_2=reference[1],
    )  # fmt: skip
    assert rows[101, 2]["judge"] == ["fake", "single-math-v1-multi-turn"] and rows[101, 2]["user_prompt"] == filled


def test_faults_change_no_other_score_and_are_reported(public_data: Path, answered: Path, tmp_path: Path, capsys) -> None:
    copy_answers(answered, tmp_path)
    with fake_judge(too_many=0.3, broken=0.2, unreadable=0.2) as (url, state):
        main(arguments(public_data, tmp_path, url, "--max-failed", "0.5"))
        printed = capsys.readouterr().out
        assert state.requests > state.served == 32
        failed = read_lines(judgments(tmp_path, "single_failed"))
        good = {(row["question_id"], row["turn"]): row["score"] for row in read_lines(judgments(tmp_path))}
        clean = {(row["question_id"], row["turn"]): row["score"] for row in read_lines(judgments(answered))}
        assert 1 <= len(failed) <= 16 and len(good) + len(failed) == 32 and good.items() <= clean.items()
        assert all("unreadable reply" in row["reason"] and row["score"] == -1 for row in failed)
        assert f"{len(failed)} judgments failed" in printed
        state.unreadable = 0.0
        before = state.served
        main(arguments(public_data, tmp_path, url))  # asks for the failures alone
        assert state.served - before == len(failed) and not read_lines(judgments(tmp_path, "single_failed"))
    assert {(r["question_id"], r["turn"]): r["score"] for r in read_lines(judgments(tmp_path))} == clean


def test_pairwise_asks_both_orders(public_data: Path, answered: Path, tmp_path: Path, capsys) -> None:
    copy_answers(answered, tmp_path)
    rows = read_lines(next((tmp_path / "data/mt_bench/model_answer").iterdir()))
    longer = [row | {"choices": [{"index": 0, "turns": [t + " and more words" for t in row["choices"][0]["turns"]]}]} for row in rows]
    write_lines(tmp_path / "other.jsonl", longer)
    with fake_judge() as (url, state):
        main(arguments(public_data, tmp_path, url, "--mode", "pairwise", "--against", str(tmp_path / "other.jsonl")))
        assert state.requests == 64
    assert {(r["g1_winner"], r["g2_winner"]) for r in read_lines(judgments(tmp_path, "pair"))} == {("model_2", "model_2")}
    assert "both orders agree in 100%, the answer shown first wins 50%" in capsys.readouterr().out
    won = {row["metric"]: row for row in read_lines(tmp_path / "scores.jsonl")}
    apart = ["turn 1", "turn 2", "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
    assert list(won) == ["win rate against other", *(f"win rate against other, {part}" for part in apart)]
    assert {row["n"] for row in won.values()} == {16, 2} and {row["limit"] for row in won.values()} == {16}
    command = [sys.executable, "-m", "fastchat.llm_judge.show_result", "--mode", "pairwise-all", "--input-file"]
    shown = subprocess.run([*command, str(judgments(tmp_path, "pair"))], capture_output=True, text=True).stdout
    assert any(line.split()[:2] == ["other", "32"] for line in shown.splitlines())


def test_bad_input_is_one_sentence(public_data: Path, answered: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    copy_answers(answered, tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "set OPENAI_API_KEY" in fails(capsys, arguments(public_data, tmp_path, "https://judge.invalid/v1"))
    assert "nothing answers" in fails(capsys, arguments(public_data, tmp_path, "http://127.0.0.1:9/v1"))
    assert "--judge NAME is needed" in fails(capsys, ["mt_bench", str(TEACHER)])
    assert "--max-cost needs --price" in fails(capsys, arguments(public_data, tmp_path, "http://127.0.0.1:9/v1", "--max-cost", "1"))
    assert "llamba eval fetch mt_bench" in fails(capsys, arguments(tmp_path, tmp_path, "http://127.0.0.1:9/v1"))
    with fake_judge(key="right") as (url, state):
        monkeypatch.setenv("OPENAI_API_KEY", "wrong")
        assert "refused the key in OPENAI_API_KEY" in fails(capsys, arguments(public_data, tmp_path, url))
        assert state.requests == 1  # the first goes alone
    with fake_judge(fatal=404) as (url, state):
        assert "knows no model 'fake'" in fails(capsys, arguments(public_data, tmp_path, url))
    with fake_judge(page=True) as (url, state):
        assert "answers, but not as a judge ('<html>" in fails(capsys, arguments(public_data, tmp_path, url)) and state.requests == 3
    with fake_judge(fatal=429, code="insufficient_quota") as (url, state):
        assert "cannot pay (" in fails(capsys, arguments(public_data, tmp_path, url)) and state.requests == 1  # and no second try
    with pytest.raises(SystemExit):
        main(arguments(public_data, tmp_path, "http://127.0.0.1:9/v1", "--judge-parameters", "3"))
    assert "must be a JSON object such as" in capsys.readouterr().err
    with fake_judge() as (url, state):
        cheap = arguments(public_data, tmp_path, url, "--price", "1000", "1000", "--max-cost", "0.01")
        assert "above --max-cost" in fails(capsys, cheap) and state.requests == 0
    path = next((tmp_path / "data/mt_bench/model_answer").iterdir())
    write_lines(path, [row | {"made_by": {"model": "another"}} for row in read_lines(path)])
    assert "answers of another model" in fails(capsys, arguments(public_data, tmp_path, "http://127.0.0.1:9/v1"))


@pytest.fixture(scope="module")
def all_answers(public_data: Path, tmp_path_factory) -> Path:
    """Short answers to all eighty questions, in FastChat's format."""
    path = tmp_path_factory.mktemp("answers") / "short.jsonl"
    questions = read_lines(public_data / "mt_bench/question.jsonl")
    write_lines(
        path, [{"question_id": q["question_id"], "choices": [{"index": 0, "turns": ["Yes.", f"No {i}."]}]} for i, q in enumerate(questions)]
    )
    return path


def by_question(out: Path, kind: str = "single") -> dict[tuple, float]:
    return {(row["question_id"], row["turn"]): row["score"] for row in read_lines(judgments(out, kind))}


@pytest.mark.parametrize("mode", ["single", "pairwise"])
def test_odd_replies_are_read_or_counted_and_spoil_nothing_else(
    public_data: Path, all_answers: Path, tmp_path: Path, capsys, mode: str
) -> None:
    """All of `ODD` among good replies: the others' scores are those of a run without, and a rerun asks for the failures alone."""
    other = tmp_path / "other.jsonl"
    write_lines(other, [row | {"choices": [{"index": 0, "turns": ["No, never.", "Yes, always."]}]} for row in read_lines(all_answers)])
    more = ["--mode", "pairwise", "--against", str(other)] if mode == "pairwise" else []

    def argv(out: str, url: str) -> list[str]:
        asked = ["--judge", "fake", "--judge-url", url, "--data", str(public_data), "--out", str(tmp_path / out), "--max-failed", "1"]
        return ["mt_bench", str(all_answers), *asked, *more]

    kind, verdict = ("pair", ("g1_winner", "g2_winner")) if more else ("single", ("score",))

    def found(out: str, failed: str = "") -> dict:
        return {(r["question_id"], r["turn"]): [r[key] for key in verdict] for r in read_lines(judgments(tmp_path / out, kind + failed))}

    with fake_judge() as (url, state):
        main(argv("clean", url))
    capsys.readouterr()
    with fake_judge(odd=0.7) as (url, state):
        main(argv("odd", url))
        assert set(state.met) == set(ODD)
        printed, asked, bad = capsys.readouterr().out, state.requests, sum(state.met[name] for name in UNREADABLE)
        assert f"{asked} judgments asked for, {bad} failed" in printed and "FastChat would read them" in printed
        if mode == "single":
            assert len(found("odd", "_failed")) == bad
        assert found("odd").items() <= found("clean").items() and len(found("odd")) + len(found("odd", "_failed")) == 160
        reasons = " ".join(row["reason"] for row in read_lines(judgments(tmp_path / "odd", f"{kind}_failed")))
        assert all(word in reasons for word, _ in UNREADABLE.values())
        state.odd, before = 0.0, state.requests
        main(argv("odd", url))
        assert state.requests - before == bad
    assert found("odd") == found("clean") and not found("odd", "_failed")


def test_every_body_is_a_reply() -> None:
    """Bodies with every part replaced by every other type; none stops the reader, and what is read can be kept and read again."""
    outputs = "".join(f'"model_identifier": "{name}",\n "output": """{name * 3}"""\n}}' for name in "mM")
    body = good_reply([{"role": "user", "content": outputs}], Faults())
    whole = json.dumps(body)
    odd: list = [None, True, -1, 1e400, math.nan, "", "x", "\ud83d", [], [[]], {}, {"content": [None]}, [{"type": "text"}], {"text": 1}]

    def variants(value: object) -> list:
        """The value with each of its parts, at any depth, replaced."""
        made = [*odd]
        places = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for place, part in places:
            for other in variants(part):
                copy = json.loads(json.dumps(value))
                copy[place] = other
                made.append(copy)
        return made

    bodies = [json.dumps(one) for one in variants(body)] + ["", "[", "{", whole[:-9], "9" * 5000, "[" * 10**5, '{"choices": ' * 10**4]
    assert len(bodies) > 400
    for one in bodies:
        reply = read_reply(one)
        assert isinstance(reply["text"], str) and (reply["why"] or reply["text"] or reply["logprobs"])
        assert validated(json.loads(json.dumps(reply))) == {
            key: value for key, value in reply.items() if key not in ("stranger", "no_money")
        }
        assert isinstance(plain_ratings(without_thoughts(reply["text"])), str)
    assert sum(read_reply(one)["why"] is None for one in bodies) > 50


def test_thoughts_are_cut_and_verdicts_stay() -> None:
    good = "Fine. Rating: [[7]]"
    blocks = ["<think>[[1]]</think>", "<THINK>[[1]]</think >\n", "[[1]] </think>", "[THINK][[1]][/THINK]", "◁think▷[[1]]◁/think▷"]
    blocks += ["<thinking>a</thinking><think>[[1]]</think>", "<|channel|>analysis<|message|>[[1]]<|end|><|channel|>final<|message|>"]
    for before in blocks:
        assert without_thoughts(before + good).strip().endswith(good) and "[[1]]" not in without_thoughts(before + good)
    assert without_thoughts("<think>[[1]]") == "" and without_thoughts(good) == good
    assert without_thoughts("I think a < b and [think] of <thin> [[5]]") == "I think a < b and [think] of <thin> [[5]]"
    assert plain_ratings("[[٧.٥]] [[007]] [[0]] [[10]] [8.] x[1_0]") == "[[7.5]] [[7]] [[0]] [[10]] [8.] x[1_0]"


def test_a_run_in_which_nothing_can_be_read_stops_after_twenty(tmp_path: Path) -> None:
    """But not one that asks for its failures again, nor one in which a single reply can be read."""
    with fake_judge(unreadable=1.0) as (url, state), Journal(tmp_path / "judge.jsonl") as journal:
        judge = Judge("fake", url, concurrency=8, price=(0.0, 1e6))

        def ask(number: int) -> JudgeClient:
            asker = JudgeClient(judge, journal, lambda: Endpoint(judge), 1)
            try:
                asker.ask(requests(number), lambda reply: "Rating" in reply["text"])
            finally:
                ask.spent = asker.spent  # type: ignore[attr-defined]
            return asker

        with pytest.raises(ValueError, match="of 20 replies none can be read .the last: unreadable reply: 'I would rather not say.'"):
            ask(100)
        assert state.requests == 20 == len(journal.rows) and ask.spent == 20 * 6  # type: ignore[attr-defined]
        state.unreadable = 0.0
        assert ask(1).asked == 1  # request 0 can be read now
        state.unreadable = 1.0
        assert ask(50).asked == 49
    for status in (403, 400):
        with fake_judge(fatal=status) as (url, state), Journal(tmp_path / f"{status}.jsonl") as journal:
            judge = Judge("fake", url, concurrency=8)
            with pytest.raises(ValueError, match=f"of 20 replies none can be read .the last: {status}"):
                JudgeClient(judge, journal, partial(Endpoint, judge), 1).ask(requests(100), lambda reply: True)
            assert state.requests == 20


@pytest.mark.parametrize(
    ("status", "code"), [(429, "insufficient_quota"), (200, "insufficient_quota"), (402, "payment"), (403, "insufficient_quota")]
)
def test_an_empty_account_stops_at_once(tmp_path: Path, status: int, code: str) -> None:
    with fake_judge() as (url, state), Journal(tmp_path / "judge.jsonl") as journal:
        judge = Judge("fake", url, concurrency=1)
        JudgeClient(judge, journal, lambda: Endpoint(judge), 1).ask(requests(4), lambda reply: True)
        state.fatal, state.code = status, code
        with pytest.raises(ValueError, match="OPENAI_API_KEY cannot pay .*add credit"):
            JudgeClient(judge, journal, lambda: Endpoint(judge), 1).ask(requests(40), lambda reply: True)
        assert state.requests == 5 and len(journal.rows) == 4


def requests(number: int) -> list[Request]:
    return [Request([{"role": "user", "content": f"Rate {i}"}], {}) for i in range(number)]


def test_a_judge_that_goes_away_loses_nothing(tmp_path: Path) -> None:
    with fake_judge() as (url, state), Journal(tmp_path / "judge.jsonl") as journal:
        judge = Judge("fake", url, retries=0, concurrency=1)
        asker = JudgeClient(judge, journal, lambda: Endpoint(judge), 1)
        asker.ask(requests(10), lambda reply: True)
        state.fatal = 500
        with pytest.raises(ValueError, match="run again to go on"):
            asker.ask(requests(30), lambda reply: True)
        assert asker.asked < 30 and len(asker.known) == 10
        state.fatal = None
        again = JudgeClient(judge, journal, lambda: Endpoint(judge), 1)
        assert again.ask(requests(30), lambda reply: True) == {} and again.asked == 20


def test_the_preflight_waits_for_a_reply(tmp_path: Path) -> None:
    """A first request that fails does not let all others through to a judge that is of no use."""

    class Failing:
        batch, workers = 1, 1

        def __call__(self, asked: list[Request]) -> list:
            number = int(asked[0].messages[0]["content"].split()[1])
            return [Failure("busy") if number < 2 else {"text": "?", "input_tokens": 1, "output_tokens": 1}]

        def close(self) -> None:
            pass

    judge = Judge("fake", "http://127.0.0.1:9/v1")
    with Journal(tmp_path / "judge.jsonl") as journal:
        asker = JudgeClient(judge, journal, Failing, 1)
        with pytest.raises(ValueError, match="of no use"):
            asker.ask(requests(30), lambda reply: True, lambda reply: "of no use")
        assert asker.asked == 3


def test_a_stop_by_hand_is_a_sentence(monkeypatch, capsys) -> None:
    def stop(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(commands.COMMANDS, "mt_bench", stop)
    with pytest.raises(SystemExit) as stopped:
        main(["mt_bench"])
    assert stopped.value.code == 130 and "the same command goes on from here" in capsys.readouterr().err


def test_a_full_disk_keeps_what_was_paid_for(tmp_path: Path, monkeypatch) -> None:
    with fake_judge() as (url, state), Journal(tmp_path / "judge.jsonl") as journal:
        judge = Judge("fake", url, concurrency=2)
        real = Journal._write

        def full_without_ballast(self: Journal, line: bytes) -> None:
            if len(self.rows) >= 5 and self.ballast.exists():
                os.write(self.file.fileno(), line[:7])
                raise OSError(28, "No space left on device")
            real(self, line)

        monkeypatch.setattr(Journal, "_write", full_without_ballast)
        with pytest.raises(ValueError, match="disk is full.*every reply so far is kept"):
            JudgeClient(judge, journal, lambda: Endpoint(judge), 1).ask(requests(30), lambda reply: True)
        assert 6 <= state.served == len(read_lines(tmp_path / "judge.jsonl")) < 30


def test_a_missing_key_is_said_before_hours_of_answering(public_data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "set OPENAI_API_KEY" in fails(capsys, arguments(public_data, tmp_path, "https://judge.invalid/v1"))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_proxy_decides_what_listens(monkeypatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    Endpoint(Judge("fake", "https://judge.invalid/v1", key_env="PATH")).close()
    monkeypatch.setenv("no_proxy", "judge.invalid")
    with pytest.raises(ValueError, match="nothing answers"):
        Endpoint(Judge("fake", "https://judge.invalid/v1", key_env="PATH"))


@pytest.mark.parametrize("where", ["answers", "scores"])
def test_a_full_disk_is_one_sentence_wherever_it_is_met(
    public_data: Path, answered: Path, tmp_path: Path, capsys, monkeypatch, where: str
) -> None:
    """Met while answering, or when everything is judged; the next run asks for nothing twice."""
    real, path = os.write, tmp_path / "data/mt_bench/model_answer/student.jsonl"

    def full(number: int, content: bytes) -> int:
        if b'"answer_id"' in content:
            raise OSError(28, "No space left on device")
        return real(number, content)

    def no_room(self: Path, *args: object, **more: object) -> int:
        raise OSError(28, "No space left on device")

    with fake_judge() as (url, state), monkeypatch.context() as patch:
        if where == "answers":
            patch.setattr(os, "write", full)
            assert "No space left" in fails(capsys, arguments(public_data, tmp_path, url)) and not path.read_bytes()
        else:
            copy_answers(answered, tmp_path)
            patch.setattr(scores.Path, "write_text", no_room)
            error = fails(capsys, [*arguments(public_data, tmp_path, url)])
            assert "the disk is full" in error and "give the same command again" in error
    with fake_judge() as (url, again):
        if where == "scores":
            main(arguments(public_data, tmp_path, url))
            assert state.requests + again.requests == 32


def test_a_budget_stops_in_the_middle(tmp_path: Path) -> None:
    with fake_judge() as (url, state), Journal(tmp_path / "judge.jsonl") as journal:
        judge = Judge("fake", url, concurrency=1, price=(0.0, 1e6), max_cost=35.0)  # a dollar a token; a reply has 6 and not 1
        with pytest.raises(ValueError, match="--max-cost 35.0 is spent"):
            JudgeClient(judge, journal, lambda: Endpoint(judge), 1).ask(requests(30), lambda reply: True)
        assert state.served == 6 == len(journal.rows)


def test_a_journal_survives_a_torn_line_and_serves_one_process(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    with Journal(path) as journal:
        assert journal.rows == [{"a": 1}]
        with pytest.raises(ValueError, match=f"in use: process {os.getpid()} on"):
            Journal(path)
        journal.append({"a": 3})
    assert read_lines(path) == [{"a": 1}, {"a": 3}] and list(tmp_path.iterdir()) == [path]
    path.write_text('{"a": 1}\nbroken\n')
    with pytest.raises(ValueError, match="line 2 must be a JSON object"):
        read_lines(path)


def test_control_tokens_are_broken_and_other_text_is_not() -> None:
    harmful = "a <|im_end|> b <|start_header_id|> c </s> d [/INST] e <end_of_turn> f <<SYS>> g <bos> h <｜end▁of▁sentence｜>"
    broken = "a < |im_end|> b < |start_header_id|> c < /s> d [ /INST] e < end_of_turn> f < <SYS>> g < bos> h < ｜end▁of▁sentence｜>"
    assert escape(harmful) == broken and escape(broken) == broken
    plain = "if a < b | c > d: x[0] <div> [[5]] <| space inside |> {braces}"
    assert escape(plain) == plain


def test_control_tokens_of_questions_and_answers_reach_the_judge_broken(public_data: Path, answered: Path, tmp_path: Path) -> None:
    for name in ("judge_prompts.jsonl", "reference_answer"):
        (tmp_path / "data/mt_bench").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data/mt_bench" / name).symlink_to(public_data / "mt_bench" / name)
    questions = read_lines(public_data / "mt_bench/question.jsonl")[:8]
    write_lines(tmp_path / "data/mt_bench/question.jsonl", [q | {"turns": ["hm <|im_start|>system", q["turns"][1]]} for q in questions])
    row = {"choices": [{"index": 0, "turns": ["good <|im_end|> \ud83d", "ok </s>"]}]}  # and half a surrogate pair, which UTF-8 cannot hold
    # eight first turns that are one question
    write_lines(tmp_path / "bad.jsonl", [row | {"question_id": q["question_id"]} for q in questions])
    with fake_judge() as (url, state):
        asked = ["--judge", "fake", "--judge-url", url, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
        main(["mt_bench", str(tmp_path / "bad.jsonl"), *asked])
    sent = "\n".join(m["content"] for body in state.prompts for m in body["messages"])
    assert "< |im_start|>system" in sent and "good < |im_end|> \ufffd" in sent and "ok < /s>" in sent
    assert len(state.prompts) == 9 and not any(token in sent for token in ("<|im_", "</s>"))


def test_the_aggregator_is_open_about_duplicates_and_failures(tmp_path: Path) -> None:
    def row(question: int, turn: int, score: float) -> dict:
        return {"question_id": question, "model": "m", "judge": ["gpt-4", "single-v1"], "turn": turn, "score": score}

    rows = [row(81, 1, 4), row(81, 1, 6), row(81, 2, 8), row(82, 1, -1), row(82, 2, 2), row(82, 1, -1), row(83, 1, 5), row(83, 1, -1)]
    write_lines(tmp_path / "gpt-4_single.jsonl", rows)
    (judged,) = read_single([tmp_path / "gpt-4_single.jsonl"])
    assert judged.duplicates == 3 and len(judged.failed) == 1 and judged.of("m") == {81: [6.0, 8.0], 82: [2.0], 83: [5.0]}
    table, text = report_single(judged, {81: "writing", 82: "writing", 83: "math"}, "gpt-4")
    values = {line["metric"]: line["value"] for line in table}
    assert values["average"] == pytest.approx(21 / 4) and values["turn 1"] == 5.5 and values["math"] == 5
    assert "1 judgments failed (1: no rating) and 3 duplicates were left out" in text


def test_the_aggregator_is_a_command(public_data: Path, answered: Path, capsys) -> None:
    main(["judgments", str(judgments(answered)), "--data", str(public_data)])
    average = next(row for row in read_lines(answered / "scores.jsonl") if row["metric"] == "average")
    assert f"average       {average['value']:.2f}" in capsys.readouterr().out


def test_a_local_model_judges(tmp_path: Path) -> None:
    judge = Judge("tiny", f"local:{TEACHER}")
    local = transport(judge)
    asked = [Request([{"role": "user", "content": text}], {"max_tokens": 4}) for text in ("hello", "What is 3 + 4?", "word " * 2000)]
    together, alone = local(asked), [local([request])[0] for request in asked]
    assert [r["text"] for r in together[:2]] == [r["text"] for r in alone[:2]] and isinstance(together[2], Failure)
    assert together[1]["text"] == "7" and "does not fit the judge's context of 1024" in together[2].reason
    top = together[1]["logprobs"]["content"][0]["top_logprobs"]
    assert len(top) == 20 and top[0]["token"] == "7" and top[0]["logprob"] > math.log(0.5)
    with Journal(tmp_path / "judge.jsonl") as journal:
        failures = JudgeClient(judge, journal, lambda: local, 4).ask(asked, lambda reply: True)
        assert len(journal.rows) == 2 and len(failures) == 1


@pytest.mark.parametrize("script", ["run_mtbench.sh", "run_alpaca.sh", "run_lm_eval.sh"])
def test_help_tells_a_newcomer_all(script: str, capsys, monkeypatch) -> None:
    text = (ROOT / "eval" / script).read_text()
    assert subprocess.run(["bash", "-n", str(ROOT / "eval" / script)]).returncode == 0 and os.access(ROOT / "eval" / script, os.X_OK)
    name = text.split("llamba.eval.commands ")[1].split()[0]
    with contextlib.suppress(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out
    for part in ("pip install", "llamba eval fetch", f"eval/{script} runs/", "OUT/scores.jsonl", "--data DIR"):
        assert part in shown, part
    assert name == "lm_eval" or all(part in shown for part in ("--max-cost", "OPENAI_API_KEY", "local:FOLDER", "same command again"))


@pytest.mark.slow
def test_the_script_runs_from_anywhere(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": sys.executable}
    script = [str(ROOT / "eval" / "run_mtbench.sh")]
    done = subprocess.run([*script, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "first time:" in done.stdout
    done = subprocess.run([*script, "nowhere/at/all", "--judge", "x"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere/at/all must be a model folder")


def test_a_missing_package_is_a_sentence(public_data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(scores, "version", lambda package: None)
    assert "needs fschat, openai, not installed; pip install" in fails(capsys, arguments(public_data, tmp_path, "http://127.0.0.1:9/v1"))


def kill_and_rerun(arguments: list[str], times: int, seed: int) -> None:
    """Run the command and kill it `times` times at random points, then run it to its end."""
    command, rng, ends = [sys.executable, "-m", "llamba.eval.commands", *arguments], random.Random(seed), []
    for _ in range(times):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(4, 14))
        process.send_signal(signal.SIGKILL)
        ends.append(process.wait())
    assert -signal.SIGKILL in ends, ends
    subprocess.run(command, cwd=ROOT, check=True)


@pytest.mark.slow
def test_killed_at_random_points_and_rerun_gives_the_same_rows(public_data: Path, tmp_path: Path) -> None:
    with fake_judge(delay=1.0) as (url, state):
        main([*arguments(public_data, tmp_path / "whole", url), "--concurrency", "2"])
        asked = state.served
        kill_and_rerun([*arguments(public_data, tmp_path / "killed", url), "--concurrency", "2"], times=5, seed=0)
        assert state.served - asked <= 32 + 5 * 2  # a kill loses at most what was on its way
    for path in ("data/mt_bench/model_answer/student.jsonl", str(judgments(tmp_path / "whole").relative_to(tmp_path / "whole"))):
        assert stable(tmp_path / "killed" / path) == stable(tmp_path / "whole" / path), path
