"""Judgments that exist already come in, FastChat's files and AlpacaEval's annotations: scores with intervals beside one's own."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamba.base.folders import finished
from llamba.eval import alpaca, fetch, foreign, judgments, stats
from llamba.eval.foreign import LocatedRow
from llamba.eval.judge import digest
from llamba.eval.mt_bench import load_questions
from llamba.eval.report import differences
from llamba.eval.scores import save, save_items, score

ANNOTATIONS = "annotations.json"


@dataclass(frozen=True)
class Found:
    """What a file came to: text, score rows, and the values of each question by benchmark and model."""

    text: str
    rows: list[dict[str, Any]]
    items: Sequence[tuple[str, str, str, str, stats.Values]]  # benchmark, model, judge, the judge's model, values


def files_of(path: Path) -> list[Path]:
    """The judgment files that a path names: itself, or those below a folder. Raises ValueError where there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} must be a file or a folder of judgments, and is not there")
    kinds = ("*_single.jsonl", "*_pair.jsonl", "*_repeat*.jsonl", "*_single*_failed.jsonl", "*_pair*_failed.jsonl", ANNOTATIONS)
    found = sorted({file for kind in kinds for file in path.rglob(kind)})
    if not found:
        raise ValueError(f"{path} must hold FastChat's *_single.jsonl or *_pair.jsonl, or AlpacaEval's {ANNOTATIONS}, and holds none")
    return found


def _kind(path: Path) -> str:
    rows = foreign.rows(path)
    if not rows:
        return "empty"
    keys = set(rows[0][1])
    kinds = {"pair": {"g1_winner", "g2_winner"}, "annotations": {"preference"}, "single": {"score"}}
    kind = next((kind for kind, needed in kinds.items() if needed <= keys), None)
    if kind is None:
        raise ValueError(f"{rows[0][0]} must be a judgment of FastChat (score, or g1_winner and g2_winner) or of AlpacaEval (preference)")
    return kind


def _categories(data: str | None) -> tuple[dict[Any, str], str]:
    """Categories of MT-Bench's questions; none, and a line, where its files are not at hand."""
    try:
        return {row["question_id"]: row["category"] for row in load_questions(data, None)}, ""
    except ValueError as error:
        return {}, f"no categories: {error}"


def read(path: Path, data: str | None) -> list[Found]:
    """Everything that the files of a path say. Raises ValueError, with file and line, for what is no judgment."""
    kinds: dict[str, list[Path]] = defaultdict(list)
    for file in files_of(path):
        kinds[_kind(file)].append(file)
    found, note = [], ""
    if kinds["single"] or kinds["pair"]:
        categories, note = _categories(data)
        found += [_single(one, categories) for one in judgments.read_single(kinds["single"])]
        found += [_pairs(one, categories) for one in judgments.read_pairs(kinds["pair"])]
    for file in kinds["annotations"]:
        found += _annotations(file, data)
    if not found:
        raise ValueError(f"{path} must hold judgments, and is empty")
    return [*found, Found(note, [], [])] if note else found


def _single(one: judgments.SingleJudgments, categories: dict[Any, str]) -> Found:
    table, text = judgments.report_single(one, categories, one.judge)
    items = [("mt_bench", model, one.judge, one.named, one.of(model)) for model in one.models if one.of(model)]
    return Found(text, [row | {"judge_is": {"model": one.named}} for row in table], items)


def _pairs(one: judgments.PairJudgments, categories: dict[Any, str]) -> Found:
    text, table, values = judgments.report_pairs(one.rows, categories, one.judge)
    first = (one.rows or one.failed)[0]
    if not one.rows:
        text = f"MT-Bench pairwise, judged by {one.judge}: {first['model_1']} against {first['model_2']}: {text}"
    twice = f" and {one.duplicates} duplicates were left out" if one.duplicates else ""
    text += f"\n  {len(one.failed)} judgments failed{twice}"
    named = f"{first['model_1']}_vs_{first['model_2']}"
    items = [("mt_bench_pairwise", named, one.judge, one.named, values)] if values else []
    return Found(text, [row | {"judge_is": {"model": one.named}, "failed": len(one.failed)} for row in table], items)


def _preference(row: dict[str, Any]) -> float | None:
    """A preference from 1 (the baseline) to 2 (the model); 0 is alpaca_eval's draw; None for what is none."""
    value = foreign.number(row.get("preference"))
    value = 1.5 if value == 0 else value
    return value if value is not None and 1 <= value <= 2 else None


def _annotations(path: Path, data: str | None) -> list[Found]:
    """AlpacaEval's annotations, by judge, model and baseline; of duplicates the last that could be read counts."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for placed in foreign.rows(path):
        key = _group(placed, path)
        instruction, group = alpaca._clean(foreign.text(placed, "instruction")), groups[key]
        row = placed[1] | {"instruction": instruction, "preference": _preference(placed[1])}
        if instruction not in group or row["preference"] is not None:
            group[instruction] = row | {"twice": instruction in group}
    return [_win_rates(key, list(rows.values()), data) for key, rows in groups.items()]


def _group(placed: LocatedRow, path: Path) -> tuple[str, str, str]:
    row = placed[1] if placed[1].get("annotator") is not None else placed[1] | {"annotator": path.resolve().parent.name}
    judge, model, baseline = (foreign.text((placed[0], row), key) for key in ("annotator", "generator_2", "generator_1"))
    return judge, model, baseline


def _win_rates(key: tuple[str, str, str], rows: list[dict[str, Any]], data: str | None) -> Found:
    judge, model, baseline = key
    against = "" if baseline == alpaca.OFFICIAL else f" against {baseline}"
    wins: stats.Values = {digest(r["instruction"])[:16]: [100 * (r["preference"] - 1)] for r in rows if r["preference"] is not None}
    failed, twice = len(rows) - len(wins), sum(row["twice"] for row in rows)
    lines = [f"AlpacaEval 2 of {model}{against}, judged by {judge}"]
    if not wins:
        return Found(f"{lines[0]}: none of {failed} judgments could be read", [], [])
    lengths = [len(row["output_2"]) for row in rows if isinstance(row.get("output_2"), str)]
    more: dict[str, Any] = {"failed": failed, "judge_is": {"model": judge}}
    more |= {"average_length": float(np.mean(lengths))} if lengths else {}
    raw = stats.bootstrap(wins)
    table = [score("alpaca_eval", f"win rate{against}", model, raw, judge, **more)]
    lines.append(f"  win rate                    {raw}")
    controlled, why = _length_controlled(rows, baseline, data)
    if controlled is not None:
        table.append(score("alpaca_eval", "length-controlled win rate", model, controlled, judge, **more))
        lines.append(f"  length-controlled win rate  {controlled}")
    lines.append(f"  {raw.n} judged, {failed} failed" + (f", {twice} stood there twice" if twice else "") + (f"; {why}" if why else ""))
    return Found("\n".join(lines), table, [(f"alpaca_eval{against}", model, judge, judge, wins)])


def _length_controlled(rows: list[dict[str, Any]], baseline: str, data: str | None) -> tuple[stats.Interval | None, str]:
    """The length-controlled win rate of annotations, put into the official order, or why there is none."""
    try:
        if baseline != alpaca.OFFICIAL:
            raise ValueError(f"it is defined against {alpaca.OFFICIAL}, and these are against {baseline}")
        gamed, reference = fetch.data_file(alpaca.GAMED, data), fetch.read_json_rows(fetch.data_file(alpaca.REFERENCE, data))
        official = [alpaca._clean(row["instruction"]) for row in reference]
        by_instruction = {row["instruction"]: row for row in rows}
        ordered = [by_instruction[one] for one in official if one in by_instruction]
        alpaca.check_for_length_control([row["instruction"] for row in ordered], official)
        if not all(isinstance(row.get(key), str) for row in ordered for key in ("output_1", "output_2")):
            raise ValueError("it needs output_1 and output_2 in every row")
        import pandas as pd

        frame = pd.DataFrame(ordered)
        frame["preference"] = frame["preference"].astype(float)
        return stats.refit_interval(len(frame), alpaca.LengthControl(frame, gamed)), ""
    except ValueError as error:
        return None, f"no length-controlled win rate: {str(error).partition('; give all')[0]}"


def run(path: str, out: str | None, data: str | None) -> str:
    """Report judgments that exist; with `out`, a run or a folder, also keep them there, beside what is there already.

    Raises ValueError, with file and line, for what is no judgment.
    """
    found = read(Path(path), data)
    parts = [one.text for one in found]
    if out is not None:
        folder = Path(out) / "eval" if Path(out).is_dir() and finished(Path(out)) else Path(out)
        keep(found, folder, Path(path))
        if gaps := differences([folder]):
            parts.append("paired differences\n" + "\n".join(gaps))
    return "\n".join(part for part in parts if part)


def keep(found: Sequence[Found], folder: Path, path: Path) -> None:
    """Scores and items into a folder, each with the name and the SHA-256 of what it came from."""
    content = hashlib.sha256()
    for file in files_of(path):
        content.update(file.read_bytes())
    made = {"from_file": path.name, "from_sha256": content.hexdigest()}
    save(folder, [row | made for one in found for row in one.rows])
    for benchmark, model, judge, named, values in (item for one in found for item in one.items):
        save_items(folder, benchmark, model, judge, values, judge_named=named, **made)
