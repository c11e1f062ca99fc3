"""Draws docs/figures/recall.svg from the rows of `make demo-recall` in eval/results/recall_embedded.jsonl.

python docs/figures/recall.py [FILE]
"""

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

ROWS = Path(__file__).parents[2] / "eval" / "results" / "recall_embedded.jsonl"
STYLES = {"teacher, 100%": ("--", "#333333"), "50%": ("-", "#5b8e7d"), "25%": ("-", "#f4a259"), "0%": ("-", "#bc4b51"),
          "0%, recurrence off": (":", "#bc4b51")}  # fmt: skip
matplotlib.rcParams |= {"svg.hashsalt": "llamba", "font.size": 10}


def draw(path: Path) -> None:
    """Exact recall against the number of facts, a line per share of attention, with 95% intervals."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, (line, colour) in STYLES.items():
        found = [row for row in rows if row["model"] == name]
        facts = [int(row["metric"].split()[0]) for row in found]
        spread = [[row["value"] - row["low"] for row in found], [row["high"] - row["value"] for row in found]]
        axes.errorbar(facts, [row["value"] for row in found], yerr=spread, marker="o", linestyle=line, color=colour, capsize=3, label=name)
    axes.set(xlabel="facts stated before", ylabel="recalled exactly, %", xscale="log", ylim=(-3, 104))
    axes.set_xticks(facts, [str(number) for number in facts])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="layers with attention", frameon=False, loc="lower left")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_suffix(".svg"))
