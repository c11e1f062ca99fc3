"""MT-Bench: 80 two-turn questions, answers with the checkpoint's own template, FastChat's judge prompts and files, any judge.

    OUT/data/mt_bench/model_answer/MODEL.jsonl            answers
    OUT/data/mt_bench/model_judgment/JUDGE_single.jsonl   judgments that could be read (JUDGE_pair.jsonl: pairwise)
    OUT/data/mt_bench/model_judgment/JUDGE_single_failed.jsonl
    OUT/judge/JUDGE.jsonl                                 every reply, from the moment it was there

`cd OUT && python -m fastchat.llm_judge.show_result --judge-model JUDGE` reads them.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamba.eval import fetch, foreign
from llamba.eval.answerer import Settings
from llamba.eval.answers import Question, answer_all, say_what_stopped
from llamba.eval.fastchat import JudgeName, modules
from llamba.eval.journal import Journal, read_lines, write_lines
from llamba.eval.judge import Failure, Judge, JudgeClient, Messages, Reply, Request, escape
from llamba.eval.judgments import SingleJudgments, report_pairs, report_single
from llamba.eval.local_judge import transport
from llamba.eval.replies import plain_ratings, without_thoughts
from llamba.eval.scores import model_name, save, save_items

PARAMETERS: dict[str, Any] = {"temperature": 0, "max_tokens": 2048, "n": 1}  # FastChat's
OUTPUT_TOKENS = 200  # of a judgment, for the estimate: GPT-4's had 780 characters
_FAILED = (-1, "error")


@dataclass(frozen=True)
class Options:
    """What to do. `against`: the model (or FastChat answer file) to compare with, in pairwise mode."""

    mode: str = "single"
    against: str | None = None
    data: str | None = None
    limit: int | None = None
    repeats: int = 1
    max_failed: float = 0.05
    estimate_only: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("single", "pairwise"):
            raise ValueError(f"--mode must be single or pairwise, got {self.mode}")
        if (self.mode == "pairwise") != (self.against is not None):
            raise ValueError("--mode pairwise and --against MODEL belong together; give both or neither")
        if self.repeats < 1:
            raise ValueError(f"--judge-repeats must be at least 1, got {self.repeats}")


@dataclass
class JudgeTask:
    """One judgment to be had: a FastChat match; `swap`: in pairwise mode, the second model's answer is shown first."""

    match: Any
    swap: bool = False
    repeat: int = 0

    def judge(self, common: Any, complete: Any) -> tuple[Any, str, str]:
        """FastChat's verdict (rating or winner), its prompt and the judgment, with `complete(messages)` for the judge."""
        m = self.match
        judge = dataclasses.replace(m.judge, model_name=JudgeName(m.judge.model_name, complete))
        if isinstance(m, common.MatchSingle):
            return common.run_judge_single(m.question, m.answer, judge, m.ref_answer, multi_turn=m.multi_turn)
        first, second = (m.answer_2, m.answer_1) if self.swap else (m.answer_1, m.answer_2)
        return common.run_judge_pair(m.question, first, second, judge, m.ref_answer, multi_turn=m.multi_turn)

    def request(self, common: Any) -> Request:
        """What the judge is asked."""
        asked: list[Messages] = []

        def note(messages: Messages) -> str:
            asked.append(messages)
            return ""

        self.judge(common, note)
        return Request(asked[0], PARAMETERS, self.repeat)

    def verdict(self, common: Any, text: str) -> tuple[Any, str, str]:
        """What FastChat reads in a judgment: a rating from 0 to 10 or -1; in pairwise mode A, B, tie or error.

        Two things it would not do: thoughts are cut off first, and digits of other scripts and leading zeros are read.
        """
        found, prompt, _ = self.judge(common, lambda messages: plain_ratings(without_thoughts(text)))
        return (-1 if isinstance(found, (int, float)) and not 0 <= found <= 10 else found), prompt, text


def load_questions(data: str | None, limit: int | None) -> list[dict[str, Any]]:
    """The questions, in order; `limit` takes the first of each category, so that all stay represented.

    Raises ValueError, with file and line, for a row that is no question of two turns.
    """
    placed = foreign.rows(fetch.data_file("mt_bench/question.jsonl", data))
    rows = [
        row
        | {
            "question_id": foreign.name((where, row), "question_id"),
            "category": foreign.text((where, row), "category"),
            "turns": foreign.texts(where, row.get("turns"), 2, "two turns"),
        }
        for where, row in placed
    ]
    foreign.require_unique([(where, row) for (where, _), row in zip(placed, rows, strict=True)], "question_id")
    if not rows:
        raise ValueError("mt_bench/question.jsonl must hold questions, and is empty")
    if limit is None:
        return rows
    if limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    categories = list(dict.fromkeys(row["category"] for row in rows))
    turn_by_turn = [
        row for place in range(len(rows)) for c in categories for row in [r for r in rows if r["category"] == c][place : place + 1]
    ]
    return sorted(turn_by_turn[:limit], key=lambda row: str(row["question_id"]).zfill(8))


def read_answers(path: Path) -> list[dict[str, Any]]:
    """FastChat's answers from a file. Raises ValueError, with file and line, for a row without a question_id and two turns."""
    found = []
    for where, row in foreign.rows(path):
        choices = row.get("choices")
        first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        turns = foreign.texts(where, first.get("turns"), 2, "choices[0].turns")
        found.append(row | {"question_id": foreign.name((where, row), "question_id"), "choices": [{"index": 0, "turns": turns}]})
    return found


def answer(name: str, out: Path, questions: Sequence[dict[str, Any]], settings: Settings) -> tuple[str, list[dict[str, Any]]]:
    """Answers of a model, made or read; `name` may be a FastChat answer file. Returns the model's name and the rows."""
    if name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise ValueError(f"{name} must be a file of answers in FastChat's format, and is not there")
        rows = read_answers(Path(name))
        have = {row["question_id"] for row in rows}
        if lacking := [q["question_id"] for q in questions if q["question_id"] not in have]:
            raise ValueError(f"{name} must answer every question; it has none for {foreign.shown(lacking[:5])} ({len(lacking)} in all)")
        return Path(name).stem, rows
    common, _ = modules()
    temperature = common.temperature_config
    asked = [
        Question(q["question_id"], tuple(q["turns"]), float(q.get("required_temperature", temperature.get(q["category"], 0.7))))
        for q in questions
    ]
    model = model_name(name)
    rows = answer_all(name, model, asked, settings, out / "data/mt_bench/model_answer" / f"{model}.jsonl")
    if cut := say_what_stopped(rows):
        print(f"{model}: {cut}")
    return model, rows


def _safe(row: dict[str, Any]) -> dict[str, Any]:
    """A question or an answer whose control tokens no judge can mistake for its own."""
    if "choices" not in row:
        return row | {"turns": [escape(text) for text in row["turns"]]}
    return row | {"choices": [{"index": 0, "turns": [escape(text) for text in row["choices"][0]["turns"]]}]}


_PROMPTS = tuple(kind + turns for kind in ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1") for turns in ("", "-multi-turn"))


def _prompts(path: Path) -> dict[str, dict[str, Any]]:
    """FastChat's judge prompts by name. Raises ValueError where one is missing or has no text."""
    prompts = {}
    for placed in foreign.rows(path):
        for key in ("type", "system_prompt", "prompt_template", "output_format"):
            foreign.text(placed, key)
        prompts[foreign.text(placed, "name")] = placed[1]
    if lacking := [name for name in _PROMPTS if name not in prompts]:
        raise ValueError(f"{path} must hold FastChat's judge prompts; it lacks {', '.join(lacking)}")
    return prompts


def judge_tasks(
    questions: Sequence[dict[str, Any]], answers: dict[str, list[dict[str, Any]]], judge: Judge, options: Options
) -> list[JudgeTask]:
    """Every judgment to be had: FastChat's four prompts by category and turn, both orders in pairwise mode, all repeats."""
    common, generate = modules()
    prompts = _prompts(fetch.data_file("mt_bench/judge_prompts.jsonl", options.data))
    path = fetch.data_file("mt_bench/reference_answer/gpt-4.jsonl", options.data)
    references = {judge.model: {row["question_id"]: _safe(row) for row in read_answers(path)}}
    if lacking := [
        q["question_id"] for q in questions if q["category"] in common.NEED_REF_CATS and q["question_id"] not in references[judge.model]
    ]:
        raise ValueError(f"{path} must answer every question of {', '.join(common.NEED_REF_CATS)}; it has none for {lacking[:5]}")
    models, questions = list(answers), [_safe(question) for question in questions]
    pairwise = options.mode == "pairwise"
    judges = (generate.make_judge_pairwise if pairwise else generate.make_judge_single)(judge.model, prompts)
    by_model = {model: {row["question_id"]: _safe(row) for row in rows} for model, rows in answers.items()}
    common.check_data(questions, by_model, references, models, judges)
    make = generate.make_match if pairwise else generate.make_match_single
    plain = [q for q in questions if q["category"] not in common.NEED_REF_CATS]
    with_reference = [q for q in questions if q["category"] in common.NEED_REF_CATS]
    matches: list[Any] = []
    for suffix, turns in (("", False), ("-mt", True)):
        matches += make(plain, models, by_model, judges["default" + suffix], models[-1], multi_turn=turns)
        matches += make(with_reference, models, by_model, judges["math" + suffix], models[-1], references, multi_turn=turns)
    return [
        JudgeTask(m, swap, repeat)
        for repeat in range(options.repeats)
        for m in matches
        for swap in ((False, True) if pairwise else (False,))
    ]


def judge_all(wanted: Sequence[JudgeTask], judge: Judge, out: Path, estimate_only: bool = False) -> tuple[list[Reply | Failure], str]:
    """A reply or a failure for each task, and a line on what it took. Raises ValueError as `JudgeClient.ask`."""
    common, _ = modules()
    requests = [task.request(common) for task in wanted]
    keys = [request.key(judge) for request in requests]

    def usable(reply: Reply) -> bool:
        return wanted[0].verdict(common, reply["text"])[0] not in _FAILED

    with Journal(out / "judge" / f"{judge.slug}.jsonl") as journal:
        asker = JudgeClient(judge, journal, lambda: transport(judge), OUTPUT_TOKENS)
        print(asker.announce(requests, usable), flush=True)
        if estimate_only:
            return [], ""
        failures = asker.ask(requests, usable)
        found = [failures[key] if key in failures else asker.known[key] for key in keys]
        return found, asker.took(failures) + _thoughts(found)


def _thoughts(replies: Sequence[Reply | Failure]) -> str:
    """A line on replies in which the judge thought aloud."""
    thought = sum(not isinstance(reply, Failure) and without_thoughts(reply["text"]) != reply["text"] for reply in replies)
    return (
        f"\n  in {thought} replies the judge's thoughts were cut off before its verdict was looked for; FastChat would read them"
        if thought
        else ""
    )


def _row(common: Any, task: JudgeTask, reply: Reply | Failure) -> dict[str, Any]:
    """FastChat's row of a single judgment; score -1 and a reason where it failed."""
    m, failed = task.match, isinstance(reply, Failure)
    verdict, prompt, judgment = task.verdict(common, "" if isinstance(reply, Failure) else reply["text"])
    row = {
        "question_id": m.question["question_id"], "model": m.model, "judge": [m.judge.model_name, m.judge.prompt_template["name"]],
        "user_prompt": prompt, "judgment": judgment, "score": verdict, "turn": 2 if m.multi_turn else 1, "tstamp": time.time(),
    }  # fmt: skip
    return row | ({"reason": reply.reason} if isinstance(reply, Failure) and failed else {})


def _pair_row(common: Any, games: Sequence[tuple[JudgeTask, Reply | Failure]]) -> dict[str, Any]:
    """FastChat's row of a match: both orders; a winner is "error" where a game failed."""
    m = games[0][0].match
    row: dict[str, Any] = {"question_id": m.question["question_id"], "model_1": m.model_1, "model_2": m.model_2}
    for number, (task, reply) in enumerate(games, 1):
        winner, prompt, judgment = task.verdict(common, "" if isinstance(reply, Failure) else reply["text"])
        names = {"A": "model_2", "B": "model_1"} if task.swap else {"A": "model_1", "B": "model_2"}
        row |= {f"g{number}_winner": names.get(winner, winner), f"g{number}_user_prompt": prompt, f"g{number}_judgment": judgment}
        row |= {"reason": reply.reason} if isinstance(reply, Failure) else {}
    judge = [m.judge.model_name, m.judge.prompt_template["name"]]
    return row | {"judge": judge, "turn": 2 if m.multi_turn else 1, "tstamp": time.time()}


def _write(out: Path, stem: str, rows: list[dict[str, Any]], failed: list[dict[str, Any]]) -> None:
    """Put these rows into the judgment files, in the place of their earlier ones; other rows stay."""
    for name, new in ((stem, rows), (f"{stem}_failed", failed)):
        path = out / "data/mt_bench/model_judgment" / f"{name}.jsonl"
        asked = {_identity(row) for row in [*rows, *failed]}
        kept = [row for row in read_lines(path) if _identity(row) not in asked]
        if kept or new or path.exists():
            write_lines(path, sorted([*kept, *new], key=lambda row: [str(part).zfill(8) for part in _identity(row)]))


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key, "") for key in ("question_id", "turn", "model", "model_1", "model_2"))


def run(name: str, out: Path, settings: Settings, judge: Judge, options: Options) -> str:
    """Answer, judge, report; returns the report. Everything that is there already is used.

    Raises ValueError as the steps do, and, after everything is written, where more than `max_failed` of the judgments failed.
    """
    common, _ = modules()
    questions = load_questions(options.data, options.limit)
    if not options.estimate_only and not (out / "judge" / f"{judge.slug}.jsonl").exists():
        judge.key()  # before hours of answering
    model, rows = answer(name, out, questions, settings)
    answers = {model: rows}
    if options.against is not None:
        other, other_rows = answer(options.against, out, questions, settings)
        if other == model:
            raise ValueError(f"--against must be another model than {model}")
        answers[other] = other_rows
    wanted = judge_tasks(questions, answers, judge, options)
    replies, took = judge_all(wanted, judge, out, options.estimate_only)
    if options.estimate_only:
        return "nothing was asked"
    categories = {q["question_id"]: q["category"] for q in questions}
    limited = {} if options.limit is None else {"limit": len(questions)}
    made = _pairwise if options.mode == "pairwise" else _single
    text, failed = made(common, list(zip(wanted, replies, strict=True)), judge, out, categories, limited)
    if failed > options.max_failed * len(wanted):
        print(text)
        raise ValueError(
            f"{failed} of {len(wanted)} judgments failed, above --max-failed {options.max_failed} "
            f"(reasons in {out}/data/mt_bench/model_judgment/{judge.slug}_*_failed.jsonl); run again to ask for those alone"
        )
    return f"{text}\n{took}"


def _single(common: Any, played: Any, judge: Judge, out: Path, categories: dict[Any, str], limited: dict[str, int]) -> tuple[str, int]:
    model = played[0][0].match.model
    rows = [(task.repeat, _row(common, task, reply)) for task, reply in played]
    repeats = 1 + max(repeat for repeat, _ in rows)
    for repeat in range(repeats):
        mine = [row for r, row in rows if r == repeat]
        stem = f"{judge.slug}_single" + (f"_repeat{repeat + 1}" if repeat else "")
        _write(out, stem, [r for r in mine if r["score"] != -1], [r for r in mine if r["score"] == -1])
    judged = SingleJudgments([r for _, r in rows if r["score"] != -1], [r for _, r in rows if r["score"] == -1])
    table, text = report_single(judged, categories, judge.slug)
    if repeats > 1:
        means = [np.mean([r["score"] for i, r in rows if i == repeat and r["score"] != -1]) for repeat in range(repeats)]
        text += f"\njudged {repeats} times: means {', '.join(f'{m:.2f}' for m in means)}, standard deviation {np.std(means, ddof=1):.3f}"
    save(out, [row | {"judge_is": judge.identity} | limited for row in table])
    if judged.rows:
        save_items(out, "mt_bench", model, judge.slug, judged.of(model), judge_named=judge.model)
    return text, len(judged.failed)


def _pairwise(common: Any, played: Any, judge: Judge, out: Path, categories: dict[Any, str], limited: dict[str, int]) -> tuple[str, int]:
    games: dict[Any, list[Any]] = defaultdict(list)
    for task, reply in played:
        games[(task.repeat, task.match.question["question_id"], task.match.multi_turn)].append((task, reply))
    rows = [(key[0], _pair_row(common, pair)) for key, pair in games.items()]
    for repeat in sorted({r for r, _ in rows}):
        mine = [row for r, row in rows if r == repeat]
        stem = f"{judge.slug}_pair" + (f"_repeat{repeat + 1}" if repeat else "")
        _write(out, stem, [r for r in mine if "reason" not in r], [r for r in mine if "reason" in r])
    good = [row for _, row in rows if "reason" not in row]
    failed = sum(isinstance(reply, Failure) for _, reply in played)
    text, table, values = report_pairs(good, categories, judge.slug)
    save(out, [row | {"judge_is": judge.identity, "failed": failed} | limited for row in table])
    if good:
        save_items(out, "mt_bench_pairwise", f"{good[0]['model_1']}_vs_{good[0]['model_2']}", judge.slug, values, judge_named=judge.model)
    return f"{text}\n  {failed} judgments failed", failed
