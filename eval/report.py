"""Scores of several models side by side: on the terminal, as Markdown, as CSV, as pictures; published numbers beside ours, marked.

A column is one benchmark, one metric and one judge. Scores of different judges never share one.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from llamba.eval import lengths
from llamba.eval.recall import draw_needle
from llamba.eval.scores import SCORES, read_items, read_models, read_scores
from llamba.eval.stats import paired

PUBLISHED = Path(__file__).parent / "published.json"
COLUMNS = "model benchmark metric judge value low high n failed attention commit command versions hardware date source".split()
Row = dict[str, Any]


def folder_of(run: str | Path) -> Path | None:
    """Where a run's scores lie: in its eval/, or in the folder itself; None where there are none."""
    return next((folder for folder in (Path(run) / "eval", Path(run)) if (folder / SCORES).is_file()), None)


def _rows(folder: Path) -> list[Row]:
    """A folder's scores, with each model's attention fraction."""
    models = read_models(folder)
    return [row | {"attention": models.get(row["model"], {}).get("attention")} for row in read_scores(folder)]


def published(rows: Sequence[Row]) -> list[Row]:
    """Published numbers of the benchmarks and metrics that stand in `rows`."""
    wanted = {(row["benchmark"], row["metric"]) for row in rows}
    return [row for row in json.loads(PUBLISHED.read_text()) if (row["benchmark"], row["metric"]) in wanted]


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    interval = f" [{row['low']:.2f}, {row['high']:.2f}]" if "low" in row else ""
    failed = f" ({row['failed']} failed)" if row.get("failed") else ""
    limited = f" (first {row['limit']:g} only)" if row.get("limit") else ""
    return f"{row['value']:.2f}{interval}{failed}{limited}"


def _tables(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and lines for each benchmark and judge: a line per model, a column per metric, or across where metrics are many.

    Tasks that are part of a group's score are left to the CSV.
    """
    made, rows = [], [row for row in rows if not row.get("part_of")]
    for benchmark, judge in dict.fromkeys((row["benchmark"], row["judge"]) for row in rows):
        mine = [row for row in rows if (row["benchmark"], row["judge"]) == (benchmark, judge)]
        metrics = list(dict.fromkeys(row["metric"] for row in mine))
        values = {(row["model"], row["metric"], "source" in row): row for row in mine}
        models = list(dict.fromkeys((row["model"], "source" in row) for row in mine))
        table = [["model", *metrics]]
        table += [[f"{m} (published)" if old else m, *(_cell(values.get((m, metric, old))) for metric in metrics)] for m, old in models]
        if len(metrics) > len(models):
            table = [list(line) for line in zip(*table, strict=True)]
        made.append((benchmark + (f", judged by {judge}" if judge else ""), table[0], table[1:]))
    return made


def _aligned(head: list[str], lines: list[list[str]]) -> str:
    wide = [max(len(line[place]) for line in [head, *lines]) for place in range(len(head))]
    return "\n".join(
        "  " + "  ".join(text.ljust(width) for text, width in zip(line, wide, strict=True)).rstrip() for line in [head, *lines]
    )


def _items(folder: Path) -> list[Row]:
    """What a folder keeps of each question, its models in the order in which they came."""
    models = list(read_models(folder))
    return sorted(read_items(folder), key=lambda item: models.index(item["model"]) if item["model"] in models else len(models))


def differences(folders: Sequence[Path]) -> list[str]:
    """A line for each pair of models with values of the same benchmark, questions and judge: the first that has them against the others."""
    items = [item for folder in dict.fromkeys(folders) for item in _items(folder)]
    together: dict[tuple[str, str | None], list[Row]] = {}
    for item in items:
        together.setdefault((item["benchmark"], item["judge"]), []).append(item)
    pairs = [(first, other, "") for first, *others in together.values() for other in others]
    pairs += [(own, other, _ALIKE.format(own["judge_named"])) for own in items for other in items if _judges_alike(own, other)]
    return [line for first, other, remark in pairs if (line := _difference(first, other, remark))]


_ALIKE = " (both judges are called {}; how the imported one was asked is not known)"


def _judges_alike(own: Row, other: Row) -> bool:
    """Whether `other` was imported, and its judge has the name, but not the identity, of the judge of `own`."""
    named = own.get("judge_named")
    alike = named is not None and named == other.get("judge_named") and own["judge"] != other["judge"]
    return alike and own["benchmark"] == other["benchmark"] and "from_file" in other and "from_file" not in own


def _difference(first: Row, other: Row, remark: str) -> str | None:
    if first["model"] == other["model"] and not remark or not set(first["values"]) & set(other["values"]):
        return None
    found = paired(first["values"], other["values"])
    return (
        f"  {first['benchmark']}: {first['model']} - {other['model']} = {found.difference}, better on {found.better}, "
        f"worse on {found.worse}, equal on {found.equal} of {found.difference.n} questions{remark}"
    )


def _made_by(rows: Sequence[Row]) -> list[str]:
    """For every command behind the rows: its model, and what it ran on."""
    last = {(row["model"], str(row["command"])): row for row in rows if "command" in row}
    return [
        f"  {model}: {command}\n    {row.get('date')}, commit {row.get('commit')}, {row.get('hardware')}; {_plain(row.get('versions'))}"
        for (model, command), row in last.items()
    ]


def write_markdown(rows: Sequence[Row], path: Path) -> None:
    """Tables, and below them what made every score."""
    parts = []
    for title, head, lines in _tables(rows):
        parts.append(
            f"## {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        )
    shown = [column for column in COLUMNS if column not in ("value", "low", "high", "n", "failed")]
    made = "\n".join("| " + " | ".join(_plain(row.get(column)).replace("|", "\\|") for column in shown) + " |" for row in rows)
    parts.append(f"## What made them\n\n| {' | '.join(shown)} |\n|{'---|' * len(shown)}\n{made}")
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {version}" for key, version in value.items())
    return "" if value is None else str(value)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """A line per score, with all that made it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([_plain(row.get(column)) for column in COLUMNS] for row in rows)


def draw_by_attention(rows: Sequence[Row], path: Path) -> bool:
    """Score against the part of layers that keep attention, one panel per benchmark, metric and judge; False where nothing can be drawn."""
    from matplotlib.figure import Figure

    apart = ("recall/needle", "lengths")  # these have pictures of their own
    known = [row for row in rows if row.get("attention") is not None and row["benchmark"] not in apart and not row.get("part_of")]
    panels = {key: [row for row in known if (row["benchmark"], row["metric"], row["judge"]) == key] for key in dict.fromkeys(
        (row["benchmark"], row["metric"], row["judge"]) for row in known)}  # fmt: skip
    panels = {key: found for key, found in panels.items() if len({row["attention"] for row in found}) > 1}
    if not panels:
        return False
    wide = min(4, len(panels))
    figure = Figure(figsize=(4.2 * wide, 3.4 * -(-len(panels) // wide)), layout="constrained")
    grid = figure.subplots(-(-len(panels) // wide), wide, squeeze=False).flatten()
    for axes, ((benchmark, metric, judge), found) in zip(grid, panels.items(), strict=False):
        found = sorted(found, key=lambda row: row["attention"])
        y = [row["value"] for row in found]
        spread = [
            [row["value"] - row.get("low", row["value"]) for row in found],
            [row.get("high", row["value"]) - row["value"] for row in found],
        ]
        axes.errorbar([row["attention"] for row in found], y, yerr=spread, marker="o", capsize=3)
        axes.set(title=benchmark + (f"\n{judge}" if judge else ""), xlabel="part of the layers with attention", ylabel=fill(metric, 30))
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)
    return True


def _needles(rows: Sequence[Row]) -> dict[str, dict[tuple[Any, ...], list[float]]]:
    found: dict[str, dict[tuple[Any, ...], list[float]]] = {}
    for row in rows:
        if row["benchmark"] == "recall/needle" and len(row.get("cell", [])) == 2:
            found.setdefault(row["model"], {})[tuple(row["cell"])] = [row["value"]]
    return {model: cells for model, cells in found.items() if len({c[0] for c in cells}) * len({c[1] for c in cells}) == len(cells)}


def report(runs: Sequence[str], out: str | Path) -> str | None:
    """Tables of all runs' scores, written to `out` as scores.md, scores.csv and pictures; returns them, or None without any score."""
    folders = [folder for run in runs if (folder := folder_of(run)) is not None]
    rows = [row for folder in folders for row in _rows(folder)]
    if not rows:
        return None
    everything = [*rows, *published(rows)]
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    write_markdown(everything, target / "scores.md")
    write_csv(everything, target / "scores.csv")
    written = ["scores.md", "scores.csv"]
    if draw_by_attention(rows, target / "attention.png"):
        written.append("attention.png")
    if needles := _needles(rows):
        draw_needle(needles, target / "needle.png")
        written.append("needle.png")
    if curves := lengths.read_curves(rows):
        lengths.draw(curves, target / "lengths.png")
        written.append("lengths.png")
    parts = [f"{title}\n{_aligned(head, lines)}" for title, head, lines in _tables(everything)]
    if gaps := differences(folders):
        parts.append("paired differences\n" + "\n".join(gaps))
    parts.append("made by\n" + "\n".join(_made_by(rows)))
    return "\n\n".join([*parts, f"written: {', '.join(str(target / name) for name in written)}"])
