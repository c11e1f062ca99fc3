"""Axes of pictures that a reader can read: plain numbers at 1, 2 and 5, and a scale that shows the small beside the large."""

from collections.abc import Iterable, Sequence
from typing import Any

DECADE = 10.0  # of the largest by the smallest value, from which a scale is logarithmic


def plain(value: float, _: Any = None) -> str:
    """A number without powers of ten: 96, 0.05, 120,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def scale_y(axes: Any, values: Iterable[float]) -> None:
    """Give matplotlib axes the vertical scale that the values ask for, with plain numbers as ticks.

    Logarithmic from a decade on; where some values are 0 or negative, linear around 0 up to the smallest size.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, SymmetricalLogLocator

    found = list(values)
    sizes = [abs(value) for value in found if value]
    if sizes and max(sizes) >= DECADE * min(sizes):
        if min(found) > 0:
            steps: Sequence[float] = (1, 2, 5) if max(sizes) < 1000 * min(sizes) else (1,)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=steps))
        else:
            axes.set_yscale("symlog", linthresh=min(sizes))
            axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=min(sizes), subs=(1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(plain)
