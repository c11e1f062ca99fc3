"""A run's training in one picture and one table: losses, distances per layer, throughput, from every stage's metrics.jsonl."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamba.base.axes import plain, scale_y
from llamba.base.folders import DONE
from llamba.base.foreign import read_object
from llamba.training.metrics import METRICS, read_metrics

PICTURE = "report.png"
_NOT_LOSSES = {"step", "tokens", "tokens_per_s", "lr", "grad_norm", "epoch"}
_LARGE = ("logps/", "logits/")  # sums over an answer's tokens, hundreds beside rewards of about one
_UNITS = {  # of a stage's losses
    "matrix": "Frobenius distance, mean over heads", "hidden": "L2 distance, mean over target tokens", "dpo": "nats, and shares of pairs",
}  # fmt: skip
_NATS = "nats per target token"
_STYLES = ("-", "--", ":", "-.")
_NAMED = 8  # layers that a legend names; more have a colour bar

Points = tuple[list[float], list[float]]  # x and y of a curve


@dataclass(frozen=True)
class Curves:
    """One stage: its folder's name, the lines of its metrics.jsonl, whether it is finished, and the seconds that it took."""

    name: str
    lines: list[dict[str, Any]]
    done: bool
    seconds: float | None

    @property
    def axis(self) -> str:
        """What runs along x: tokens where they were counted, else optimizer steps."""
        return "tokens" if any("tokens" in line for line in self.lines) else "step"

    def curve(self, key: str, layer: str | None = None) -> Points:
        """The points of a number, or of one layer's number. A line without x (held-out scores) stands where the line before it stands."""
        x: float = 0
        points: Points = [], []
        for line in self.lines:
            x = line.get(self.axis, x)
            value = line.get(key) if layer is None else line.get(key, {}).get(layer)
            if isinstance(value, (int, float)):
                points[0].append(x)
                points[1].append(value)
        return points

    def losses(self) -> list[str]:
        """Keys of losses and scores, in order of appearance."""
        keys = dict.fromkeys(key for line in self.lines for key, value in line.items() if isinstance(value, (int, float)))
        return [key for key in keys if key not in _NOT_LOSSES and not key.removeprefix("eval_").startswith(_LARGE)]

    def layers(self) -> list[str]:
        """Layers with a distance of their own (a line's `layers`: layer -> number), in order."""
        keys = dict.fromkeys(layer for line in self.lines for layer in line.get("layers", {}))
        return sorted(keys, key=int)

    @property
    def unit(self) -> str:
        """What the losses are in."""
        return _UNITS.get(self.name.partition("-")[2], _NATS)


def _seconds(stage: Path) -> float | None:
    path = stage / "stage.json"
    seconds = read_object(path).get("seconds") if path.exists() else None
    if path.exists() and not isinstance(seconds, (int, float)):
        raise ValueError(f"{path} must say how many seconds the stage took, got {str(seconds)[:40]!r}; it is no stage's report")
    return seconds


def curves_of(run: Path) -> list[Curves]:
    """The stages of a run folder that left metrics, in order, finished or not. Raises ValueError where there is none."""
    stages = [path.parent for path in run.glob(f"*-*/{METRICS}") if path.parent.name.partition("-")[0].isdigit()]
    stages.sort(key=lambda stage: int(stage.name.partition("-")[0]))
    read = [(stage, read_metrics(stage / METRICS)) for stage in stages]
    found = [Curves(stage.name, lines, (stage / DONE).exists(), _seconds(stage)) for stage, lines in read if lines]
    if not found:
        raise ValueError(f"{run} must be a run folder with a stage that has begun to train (N-stage/{METRICS}), found none")
    return found


def _along(axes: Any, stage: Curves, title: str, ylabel: str) -> None:
    axes.set(title=title, xlabel=stage.axis, ylabel=ylabel)
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.get_major_locator().set_params(nbins=6)


def _draw_losses(axes: Any, stage: Curves) -> None:
    """A loss that equals one of its parts shines through under it: wider and paler first, narrower and broken behind."""
    for place, key in enumerate(stage.losses()):
        x, y = stage.curve(key)
        style: dict[str, Any] = {"linewidth": 5, "alpha": 0.35} if place == 0 else {"linestyle": _STYLES[(place - 1) % len(_STYLES)]}
        if key.startswith("eval"):
            style = {"linestyle": "none", "marker": "o", "fillstyle": "none", "markersize": 6 + 3 * place}
        axes.plot(x, y, label=key, **({"marker": "o"} if len(x) == 1 else {}) | style)
    scale_y(axes, [value for key in stage.losses() for value in stage.curve(key)[1]])
    _along(axes, stage, stage.name, stage.unit)
    if stage.losses():
        axes.legend(fontsize="small")


def _draw_layers(axes: Any, stage: Curves) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    layers, colours = stage.layers(), colormaps["viridis"]
    span = Normalize(int(layers[0]), max(int(layers[-1]), int(layers[0]) + 1))
    for layer in layers:
        axes.plot(*stage.curve("layers", layer), color=colours(span(int(layer))), label=layer)
    scale_y(axes, [value for layer in layers for value in stage.curve("layers", layer)[1]])
    _along(axes, stage, f"{stage.name}: each layer", "distance to the teacher's")
    if len(layers) <= _NAMED:
        axes.legend(title="layer", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axes.figure.colorbar(ScalarMappable(span, colours), ax=axes, label="layer")


def _draw_speed(axes: Any, stage: Curves) -> None:
    axes.plot(*stage.curve("tokens_per_s"), color="tab:green")
    _along(axes, stage, f"{stage.name}: throughput", "tokens per second")
    axes.yaxis.set_major_formatter(plain)
    axes.set_ylim(bottom=0, top=1.1 * max(stage.curve("tokens_per_s")[1], default=1.0))


def draw(stages: Sequence[Curves], path: Path) -> None:
    """One row per stage: losses; where measured, the distance of each layer; throughput."""
    from matplotlib.figure import Figure  # half a second, and only for pictures

    wide = 3 if any(stage.layers() for stage in stages) else 2
    figure = Figure(figsize=(5 * wide, 3.5 * len(stages)), layout="constrained")
    grid = figure.subplots(len(stages), wide, squeeze=False)
    for row, stage in zip(grid, stages, strict=True):
        _draw_losses(row[0], stage)
        if stage.layers():
            _draw_layers(row[1], stage)
        elif wide == 3:
            row[1].set_axis_off()
        _draw_speed(row[-1], stage)
    figure.savefig(path, dpi=110)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(stages: Sequence[Curves]) -> str:
    """One line per stage: steps, tokens, first and last loss, held-out loss, median tokens per second, minutes."""
    lines = [f"{'stage':<18}{'steps':>8}{'tokens':>16}{'loss: first':>13}{'last':>10}{'held out':>10}{'tok/s':>10}{'minutes':>9}"]
    for stage in stages:
        losses, held_out = (stage.curve(key)[1] for key in ("loss", "eval_loss"))
        speed = stage.curve("tokens_per_s")[1]
        last = {key: max((line[key] for line in stage.lines if key in line), default=None) for key in ("step", "tokens")}
        lines.append(
            f"{stage.name:<18}{_number(last['step'], ','):>8}{_number(last['tokens'], ','):>16}"
            f"{_number(losses[0] if losses else None, '.4f'):>13}{_number(losses[-1] if losses else None, '.4f'):>10}"
            f"{_number(held_out[-1] if held_out else None, '.4f'):>10}{_number(statistics.median(speed) if speed else None, ',.0f'):>10}"
            f"{_number(None if stage.seconds is None else stage.seconds / 60, ',.1f'):>9}{'' if stage.done else '  not finished'}"
        )
    return "\n".join(lines)


def report(run: str | Path) -> str:
    """Draw `report.png` in a run folder; returns the table. Raises ValueError for a folder that is no run with metrics."""
    stages = curves_of(Path(run))
    draw(stages, Path(run) / PICTURE)
    return f"{run}\n{table(stages)}\npicture: {Path(run) / PICTURE}"
