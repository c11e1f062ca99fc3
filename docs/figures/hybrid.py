"""Draws docs/figures/hybrid.svg: a teacher, the hybrid that is made of it, and where one mixer's weights come from.

python docs/figures/hybrid.py [FILE]
"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

matplotlib.rcParams |= {"svg.hashsalt": "llamba", "font.size": 10}
ATTENTION, MIXER, MLP, PLAIN, INK = "#f4a259", "#5b8e7d", "#e8e8e8", "#ffffff", "#333333"
LAYERS = ("mixer", "attention", "mixer", "attention")  # from the bottom
WIDTH, HEIGHT, GAP = 2.3, 0.42, 0.12


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = WIDTH, height: float = HEIGHT) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=colour, edgecolor=INK, linewidth=0.8)
    axes.add_patch(shape)
    light = colour == MIXER
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white" if light else INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    """An arrow from point to point."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=INK, linewidth=1.0, **style))


def stack(axes: Axes, x: float, title: str, kinds: tuple[str, ...]) -> None:
    """A model as a column: embeddings, layers of attention or mixer and MLP, head."""
    names = {"attention": ("attention", ATTENTION), "mixer": ("Mamba-2", MIXER)}
    rows = [("embeddings", PLAIN), *(row for kind in kinds for row in (names[kind], ("MLP", MLP))), ("head", PLAIN)]
    for number, (text, colour) in enumerate(rows):
        box(axes, x, number * (HEIGHT + GAP), text, colour)
    axes.text(x + WIDTH / 2, len(rows) * (HEIGHT + GAP) + 0.12, title, ha="center", va="bottom", fontweight="bold", color=INK)


def weights(axes: Axes, x: float) -> None:
    """Where the parts of one mixer come from."""
    axes.text(x + 1.95, 5.52, "inside one converted layer", ha="center", va="bottom", fontweight="bold", color=INK)
    for number, (source, target) in enumerate((("O", "output"), ("Q", "C  (read)"), ("K", "B  (write)"), ("V", "x  (input)"))):
        y = 1.62 + number * 0.62
        box(axes, x, y, source, ATTENTION, width=0.8)
        box(axes, x + 2.1, y, target, MIXER, width=1.8)
        arrow(axes, (x + 0.85, y + HEIGHT / 2), (x + 2.05, y + HEIGHT / 2))
    axes.text(x + 1.45, 4.22, "copied", ha="center", color=INK, style="italic")
    box(axes, x + 2.1, 4.72, "decay, gate, conv", PLAIN, width=1.8)
    axes.text(x + 2.0, 4.93, "new, starts close\nto linear attention", ha="right", va="center", fontsize=8.5, color=INK, style="italic")
    recurrence = "state  =  decay · state + x Bᵀ\noutput  =  state · C"
    axes.text(x + 1.95, 0.8, recurrence, ha="center", va="center", color=INK, family="DejaVu Sans Mono", fontsize=9)
    axes.text(x + 1.95, 0.2, "a state of fixed size, whatever the length", ha="center", va="center", fontsize=9, color=INK)


def draw(path: Path) -> None:
    """Write the picture; the same bytes for the same matplotlib."""
    figure = Figure(figsize=(10.4, 5.0))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-0.35, 12.15)
    axes.set_ylim(-0.3, 6.1)
    axes.axis("off")
    stack(axes, 0, "teacher", ("attention",) * len(LAYERS))
    stack(axes, 4.3, "hybrid, half attention", LAYERS)
    middle = 2.6
    arrow(axes, (WIDTH + 0.2, middle), (4.1, middle))
    axes.text((WIDTH + 4.3) / 2, middle + 0.18, "convert", ha="center", va="bottom", color=INK)
    then = "then distil:\nlearn the\nteacher's\nprobabilities"
    axes.text((WIDTH + 4.3) / 2, middle - 0.18, then, ha="center", va="top", fontsize=9, color=INK)
    arrow(axes, (4.3 + WIDTH + 0.12, 0.76), (8.0, 1.35), connectionstyle="arc3,rad=-0.15")
    weights(axes, 8.1)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_suffix(".svg"))
