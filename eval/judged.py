"""What a judge said in MT-Bench, as FastChat's files hold it: read, averaged, with intervals; failures and duplicates said."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llamba.eval import stats
from llamba.eval.journal import read_lines
from llamba.eval.scores import score


@dataclass
class Judged:
    """What a judge said of models: FastChat rows that could be read, those that could not, and what was counted twice in a file."""

    rows: list[dict[str, Any]]
    failed: list[dict[str, Any]] = field(default_factory=list)
    duplicates: int = 0

    @property
    def models(self) -> list[str]:
        """Names in single judgments."""
        return sorted({row["model"] for row in self.rows})

    def of(self, model: str, turn: int | None = None, questions: set[Any] | None = None) -> dict[Any, list[float]]:
        """Scores of a model by question: both turns, or one; all questions, or these."""
        found: dict[Any, list[float]] = defaultdict(list)
        for row in self.rows:
            if row["model"] == model and turn in (None, row["turn"]) and (questions is None or row["question_id"] in questions):
                found[row["question_id"]].append(float(row["score"]))
        return dict(found)


def read_judgments(path: Path) -> Judged:
    """FastChat's single judgments from a file: of duplicates the last that could be read counts; rows with -1 are failures.

    Raises ValueError for a row without FastChat's keys.
    """
    rows, best, duplicates = read_lines(path), {}, 0
    for row in rows:
        if missing := {"question_id", "model", "judge", "turn", "score"} - set(row):
            raise ValueError(f"{path} must hold FastChat's single judgments; a row has no {', '.join(sorted(missing))}")
        key = (row["question_id"], row["model"], tuple(row["judge"]), row["turn"])
        duplicates += key in best
        if key not in best or row["score"] != -1:
            best[key] = row
    return Judged([r for r in best.values() if r["score"] != -1], [r for r in best.values() if r["score"] == -1], duplicates)


def report_single(judged: Judged, categories: dict[Any, str], judge: str) -> tuple[list[dict[str, Any]], str]:
    """Score rows and a table of single judgments: average, each turn, each category, with intervals, n and failures."""
    table, lines = [], []
    for model in judged.models:
        failed = sum(row["model"] == model for row in judged.failed)
        parts: dict[str, dict[Any, list[float]]] = {"average": judged.of(model)}
        parts |= {f"turn {turn}": judged.of(model, turn) for turn in (1, 2)}
        for category in dict.fromkeys(categories.values()):
            parts[category] = judged.of(model, questions={q for q, c in categories.items() if c == category})
        lines.append(f"MT-Bench of {model}, judged by {judge}")
        for metric, values in parts.items():
            if not values:
                continue
            interval = stats.bootstrap(values)
            table.append(score("mt_bench", metric, model, interval, judge, failed=failed))
            lines.append(f"  {metric:<12} {interval.mean:5.2f}  [{interval.low:5.2f}, {interval.high:5.2f}]  {interval.n} questions")
        lines.append(f"  {failed} judgments failed and {judged.duplicates} duplicates were left out" if judged.duplicates else
                     f"  {failed} judgments failed")  # fmt: skip
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
    parts = {"": list(rows)} | {f"turn {turn}": [row for row in rows if row["turn"] == turn] for turn in (1, 2)}
    for category in dict.fromkeys(categories.values()):
        parts[category] = [row for row in rows if categories[row["question_id"]] == category]
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
