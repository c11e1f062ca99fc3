"""What judges said in MT-Bench, as FastChat's files hold it: read, averaged, with intervals; failures and duplicates said.

Two judges are never averaged, whatever file they stand in.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llamba.eval import foreign, stats
from llamba.eval.foreign import LocatedRow
from llamba.eval.judge import slug
from llamba.eval.scores import score

SCALE = (0.0, 10.0)
_WINNERS = ("model_1", "model_2", "tie")
_STEM = re.compile(r"(?P<judge>.*?)_(?:single|pair)(?:_repeat(?P<repeat>\d+))?(?:_failed)?$")


@dataclass
class SingleJudgments:
    """What a judge said of models, one by one: FastChat rows that could be read, those that could not, and what stood there twice.

    `judge` distinguishes it from all others, `named` is the model that judged.
    """

    rows: list[dict[str, Any]]
    failed: list[dict[str, Any]] = field(default_factory=list)
    duplicates: int = 0
    judge: str = ""
    named: str = ""

    @property
    def models(self) -> list[str]:
        """Names in single judgments, also those of which nothing could be read."""
        return sorted({row["model"] for row in [*self.rows, *self.failed]})

    def of(self, model: str, turn: int | None = None, questions: set[Any] | None = None) -> dict[Any, list[float]]:
        """Scores of a model by question: both turns, or one; all questions, or these."""
        found: dict[Any, list[float]] = defaultdict(list)
        for row in self.rows:
            if row["model"] == model and turn in (None, row["turn"]) and (questions is None or row["question_id"] in questions):
                found[row["question_id"]].append(float(row["score"]))
        return dict(found)


@dataclass
class PairJudgments:
    """What a judge said of two models against each other; every row has the same `model_1`."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    duplicates: int = 0
    judge: str = ""
    named: str = ""


def _judge_of(placed: LocatedRow, path: Path) -> tuple[str, str]:
    """The label and the model of a row's judge. The label is the model's name, or the file's where that is one of ours, which says more."""
    where, row = placed
    judge = row.get("judge")
    named = judge[0] if isinstance(judge, list) and judge else judge
    if not isinstance(named, str) or not named:
        raise ValueError(f"{where} must have its judge, [name, prompt], got {foreign.shown(judge)}")
    match = _STEM.match(path.stem)
    ours = match and re.fullmatch(re.escape(slug(named)) + "-[0-9a-f]{8}", match["judge"])
    return (match["judge"] if match and ours else named), named


def _checked(placed: LocatedRow, models: Sequence[str], path: Path) -> dict[str, Any]:
    """A row with its question, turn, models and judge in order. Raises ValueError, with file and line, where one is missing."""
    where, row = placed
    turn = foreign.name(placed, "turn")
    if not isinstance(turn, int) or turn < 1:
        raise ValueError(f"{where} must have a turn, 1 or 2, got {foreign.shown(turn)}")
    judge, named = _judge_of(placed, path)
    match = _STEM.match(path.stem)
    found = {"question_id": foreign.name(placed, "question_id"), "turn": turn, "judge": judge, "named": named}
    found |= {"repeat": int(match["repeat"]) if match and match["repeat"] else 1}
    return row | {model: foreign.text(placed, model) for model in models} | found


def read_single(paths: Sequence[Path]) -> list[SingleJudgments]:
    """FastChat's single judgments, a `SingleJudgments` for each judge: of duplicates the last that could be read counts.

    Rows of -1, and those whose score is no number from 0 to 10, are failures, with a reason.

    Raises ValueError, with file and line, for a row that does not say of which question, model, judge and turn it speaks.
    """
    best: dict[str, dict[Any, dict[str, Any]]] = defaultdict(dict)
    duplicates: Counter[str] = Counter()
    for path in paths:
        for placed in foreign.rows(path):
            if "score" not in placed[1]:
                raise ValueError(f"{placed[0]} must hold one of FastChat's single judgments, and has no score")
            row = _scored(_checked(placed, ("model",), path))
            key = (row["question_id"], row["model"], row["turn"], row["repeat"])
            duplicates[row["judge"]] += key in best[row["judge"]]
            if key not in best[row["judge"]] or "reason" not in row:
                best[row["judge"]][key] = row
    return [
        SingleJudgments(*_apart(list(rows.values())), duplicates[judge], judge, next(iter(rows.values()))["named"])
        for judge, rows in best.items()
    ]


def _scored(row: dict[str, Any]) -> dict[str, Any]:
    value = foreign.number(row["score"])
    row = {key: part for key, part in row.items() if key != "reason"}
    if value is not None and SCALE[0] <= value <= SCALE[1]:
        return row | {"score": value}
    return row | {"score": -1, "reason": "no rating" if value == -1 else "a score that is no number from 0 to 10"}


def _apart(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return [row for row in rows if "reason" not in row], [row for row in rows if "reason" in row]


def read_pairs(paths: Sequence[Path]) -> list[PairJudgments]:
    """FastChat's pairwise judgments, a `PairJudgments` for each judge and pair; the first row says which model is `model_1`.

    Winners other than model_1, model_2 and tie are failures. Raises ValueError as `read_single`.
    """
    best: dict[Any, dict[Any, dict[str, Any]]] = defaultdict(dict)
    duplicates: Counter[Any] = Counter()
    for path in paths:
        for placed in foreign.rows(path):
            row = _checked(placed, ("model_1", "model_2"), path)
            if row["model_1"] == row["model_2"]:
                raise ValueError(f"{placed[0]} must compare two models, got {foreign.shown(row['model_1'])} twice")
            row = {key: part for key, part in row.items() if key != "reason"}
            if any(row.get(game) not in _WINNERS for game in ("g1_winner", "g2_winner")):
                row["reason"] = "no verdict"
            group = (row["judge"], frozenset((row["model_1"], row["model_2"])))
            first = next(iter(best[group].values()), row)
            row = row if row["model_1"] == first["model_1"] else _turned(row)
            key = (row["question_id"], row["turn"], row["repeat"])
            duplicates[group] += key in best[group]
            if key not in best[group] or "reason" not in row:
                best[group][key] = row
    return [
        PairJudgments(*_apart(list(rows.values())), duplicates[group], group[0], next(iter(rows.values()))["named"])
        for group, rows in best.items()
    ]


def _turned(row: dict[str, Any]) -> dict[str, Any]:
    """A match told from the other model's side: its first game is the one in which the new model_1 was shown first."""
    other = {"model_1": "model_2", "model_2": "model_1"}
    games = {"g1_winner": other.get(row["g2_winner"], row["g2_winner"]), "g2_winner": other.get(row["g1_winner"], row["g1_winner"])}
    return row | {"model_1": row["model_2"], "model_2": row["model_1"]} | games


def report_single(judged: SingleJudgments, categories: dict[Any, str], judge: str) -> tuple[list[dict[str, Any]], str]:
    """Score rows and a table of single judgments: average, each turn, each category, with intervals, n and failures."""
    table, lines = [], []
    for model in judged.models:
        failed = Counter(row.get("reason", "failed").partition(":")[0] for row in judged.failed if row["model"] == model)
        parts: dict[str, dict[Any, list[float]]] = {"average": judged.of(model)}
        parts |= {f"turn {turn}": judged.of(model, turn) for turn in sorted({1, 2} | {row["turn"] for row in judged.rows})}
        for category in dict.fromkeys(categories.values()):
            parts[category] = judged.of(model, questions={q for q, c in categories.items() if c == category})
        lines.append(f"MT-Bench of {model}, judged by {judge}")
        for metric, values in parts.items():
            if not values:
                continue
            interval = stats.bootstrap(values)
            table.append(score("mt_bench", metric, model, interval, judge, failed=failed.total()))
            lines.append(f"  {metric:<12} {interval.mean:5.2f}  [{interval.low:5.2f}, {interval.high:5.2f}]  {interval.n} questions")
        why = " (" + ", ".join(f"{number}: {reason}" for reason, number in failed.most_common()) + ")" if failed else ""
        twice = f" and {judged.duplicates} duplicates were left out" if judged.duplicates else ""
        lines.append(f"  {failed.total()} judgments failed{why}{twice}")
        if not parts["average"]:
            lines.append("  nothing could be read, so there is no score")
    return table, "\n".join(lines)


def _points(row: dict[str, Any]) -> float:
    """1 for a win of model_1 in both orders, 0 for a loss in both, 0.5 for the rest (FastChat's reading)."""
    if row["g1_winner"] != row["g2_winner"]:
        return 0.5
    return {"model_1": 1.0, "model_2": 0.0}.get(row["g1_winner"], 0.5)


def report_pairs(
    rows: Sequence[dict[str, Any]], categories: dict[Any, str], judge: str
) -> tuple[str, list[dict[str, Any]], dict[Any, list[float]]]:
    """Win rate of model_1 (ties and contradictions half): of all, of each turn and category; how often both orders agree, how often the
    answer shown first wins. Returns the text, the score rows, and the points of each question."""
    if not rows:
        return "no pair could be judged", [], {}
    model, other = rows[0]["model_1"], rows[0]["model_2"]
    agree = 100 * float(np.mean([row["g1_winner"] == row["g2_winner"] for row in rows]))
    decided = [row["g1_winner"] == "model_1" for row in rows if row["g1_winner"] != "tie"]
    decided += [row["g2_winner"] == "model_2" for row in rows if row["g2_winner"] != "tie"]
    first = 100 * float(np.mean(decided)) if decided else 50.0
    turns = sorted({1, 2} | {row["turn"] for row in rows})
    parts = {"": list(rows)} | {f"turn {turn}": [row for row in rows if row["turn"] == turn] for turn in turns}
    for category in dict.fromkeys(categories.values()):
        parts[category] = [row for row in rows if categories.get(row["question_id"]) == category]
    table, lines = [], [f"MT-Bench pairwise, judged by {judge}: {model} against {other}"]
    for part, found in parts.items():
        if not found:
            continue
        rate = stats.bootstrap(_points_by_question(found))
        metric = f"win rate against {other}" + (f", {part}" if part else "")
        table.append(score("mt_bench_pairwise", metric, model, rate, judge, against=other, orders_agree=agree, first_shown_wins=first))
        lines.append(f"  {part or 'win rate':<12} {rate}  {rate.n} questions" + ("" if part else ", ties and contradictions half"))
    lines.append(f"  both orders agree in {agree:.0f}%, the answer shown first wins {first:.0f}% of the decided games")
    return "\n".join(lines), table, _points_by_question(rows)


def _points_by_question(rows: Sequence[dict[str, Any]]) -> dict[Any, list[float]]:
    values: dict[Any, list[float]] = defaultdict(list)
    for row in rows:
        values[row["question_id"]].append(100 * _points(row))
    return dict(values)
