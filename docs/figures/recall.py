"""Draws docs/figures/recall.svg from the rows of `make demo-recall` in eval/results/recall_embedded.jsonl.

python docs/figures/recall.py [FILE]
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROWS = Path(__file__).parents[2] / "eval" / "results" / "recall_embedded.jsonl"
STYLES = {"teacher, 100%": ("--", "#333333"), "50%": ("-", "#5b8e7d"), "25%": ("-", "#f4a259"), "0%": ("-", "#bc4b51"),
          "0%, recurrence off": (":", "#bc4b51")}  # fmt: skip
matplotlib.rcParams |= {"svg.hashsalt": "llamba", "font.size": 10}


def numbered(metric: str) -> tuple[str, int]:
    """Which panel a metric belongs to, and its place there: "8 facts" or "4 facts, 20 tokens between"."""
    facts, _, apart = metric.partition(", ")
    return ("apart", int(apart.split()[0])) if apart else ("facts", int(facts.split()[0]))


def panel(axes: Axes, rows: list[dict[str, Any]], kind: str, label: str) -> None:
    """Exact recall against a number, a line per share of attention, with 95% intervals."""
    for name, (line, colour) in STYLES.items():
        found = [row for row in rows if row["model"] == name and numbered(row["metric"])[0] == kind]
        places = [numbered(row["metric"])[1] for row in found]
        spread = [[row["value"] - row["low"] for row in found], [row["high"] - row["value"] for row in found]]
        axes.errorbar(places, [row["value"] for row in found], yerr=spread, marker="o", linestyle=line, color=colour, capsize=3, label=name)
    axes.set(xlabel=label, ylabel="recalled exactly, %", ylim=(-3, 104))
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(number) for number in places])
    axes.spines[["top", "right"]].set_visible(False)


def draw(path: Path) -> None:
    """By the number of facts, and by how far away they are."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    panel(left, rows, "facts", "facts stated before")
    panel(right, rows, "apart", "tokens between four facts and the question")
    right.legend(title="layers with attention", frameon=False, loc="center", fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_suffix(".svg"))
