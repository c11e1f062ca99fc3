"""How far back a fact lies that was asked for, and what is recalled at each distance.

The distance counts the tokens from the fact's last one to the last one before the answer. Shapes: none; a trial is one text, with one or
more questions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamba.eval import stats
from llamba.models.mixers import Mixer


@dataclass(frozen=True)
class Asked:
    """One question: per cent right (0 or 100), the position of its fact's first token, and the distance of its last."""

    value: float
    start: int
    distance: int


Trial = Sequence[Asked]


@dataclass(frozen=True)
class Sight:
    """What recurrent layers see besides their state: their last `window` tokens and the first `sinks`."""

    window: int
    sinks: int

    def reaches(self, asked: Asked) -> bool:
        """Whether any token of the fact is seen from the place of the answer."""
        return asked.distance < self.window or asked.start < self.sinks

    def __str__(self) -> str:
        return f"window {self.window} and sinks {self.sinks}"


def sight_of(model: Any) -> Sight | None:
    """The widest window and the most sinks of a model's mixers; None for a model without any."""
    found = [module.sight for module in model.modules() if isinstance(module, Mixer) and module.sight is not None]
    return Sight(max(s.window for s in found), max(s.sinks for s in found)) if found else None


def by_distance(trials: Mapping[Any, Trial]) -> dict[tuple[int, int], stats.Interval]:
    """Recall by distance, in powers of two: (1, 2), (3, 4), (5, 8), ... -> per cent; a trial's questions stay together."""
    bins: dict[tuple[int, int], dict[Any, list[float]]] = {}
    for key, trial in trials.items():
        for asked in trial:
            power = max(1, (asked.distance - 1).bit_length())
            low = 1 if power == 1 else 2 ** (power - 1) + 1
            bins.setdefault((low, 2**power), {}).setdefault(key, []).append(asked.value)
    return {bounds: stats.share(values) for bounds, values in sorted(bins.items())}


def out_of_sight(trials: Mapping[Any, Trial], sight: Sight) -> stats.Interval | None:
    """Recall of facts that lie wholly beyond a window and sinks; None where none does."""
    values = {key: [asked.value for asked in trial if not sight.reaches(asked)] for key, trial in trials.items()}
    return stats.share(values) if any(values.values()) else None


def draw(curves: Mapping[str, Mapping[tuple[int, int], stats.Interval]], path: Path, sight: Sight | None = None) -> None:
    """Recall against distance, a line per curve with 95% intervals; a window's edge as a dotted line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, found in curves.items():
        points = list(found.values())
        spread = [[p.mean - p.low for p in points], [p.high - p.mean for p in points]]
        style = "--" if "off" in name else "-"
        axes.errorbar(
            [high for _, high in found], [p.mean for p in points], yerr=spread, marker="o", linestyle=style, capsize=3, label=name
        )
    if sight is not None:
        axes.axvline(sight.window, color="grey", linestyle=":", label=f"window of {sight.window}")
    axes.set(xlabel="distance of the fact, tokens (up to)", ylabel="recalled, %", xscale="log", ylim=(-3, 103))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
