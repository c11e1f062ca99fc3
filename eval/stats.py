"""Statistics of scores: intervals by bootstrap over questions, and paired differences.

A question is the unit: all its values (both turns, all repeats) are drawn together. Q questions, R resamples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
_Z = 1.959964  # standard normal quantile of that level

Values = Mapping[Any, Sequence[float]]  # question -> its values


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval, over `n` questions."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def _percentiles(drawn: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def draws(questions: int, seed: int, resamples: int = RESAMPLES) -> NDArray[np.int64]:
    """How often each question is drawn in each resample [R, Q]; every row sums to Q."""
    return np.random.default_rng(seed).multinomial(questions, np.full(questions, 1 / questions), size=resamples)


def bootstrap(values: Values, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean over all values with its percentile interval; questions are drawn, not values. Raises ValueError without any value.

    The interval depends on what the values are, not on their order or on the questions' names, and lies within their range.
    """
    held = [np.sort(np.asarray(v, dtype=float)) for v in values.values() if len(v)]
    if not held:
        raise ValueError("a score needs at least one question that was judged, got none")
    held.sort(key=lambda v: v.tolist())
    sums, counts = np.array([v.sum() for v in held]), np.array([float(v.size) for v in held])
    weights = draws(len(held), seed, resamples)
    low, high = _percentiles((weights @ sums) / (weights @ counts))
    least, most = float(min(v[0] for v in held)), float(max(v[-1] for v in held))
    return Interval(float(sums.sum() / counts.sum()), max(low, least), min(high, most), len(held))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n questions: within 0 and 1, and of some width at 0 and 1 too (J. Am. Stat. Assoc. 22, 1927)."""
    middle, room = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n), _Z / (1 + _Z**2 / n)
    half = room * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # a rounding away from 0 and 1 otherwise


def share(values: Values) -> Interval:
    """Per cent of questions, each right (100) or wrong (0), with Wilson's interval; other values are bootstrapped.

    Where a question has several values and all of all are alike, a bootstrap would have no width: Wilson's then too, by questions.
    """
    held = [[float(one) for one in v] for v in values.values() if len(v)]
    apart = {one for v in held for one in v}
    if not held or apart - {0.0, 100.0} or (len(apart) > 1 and any(len(v) > 1 for v in held)):
        return bootstrap(values)
    mean = sum(v[0] for v in held) / len(held)
    low, high = wilson(mean / 100, len(held))
    return Interval(mean, 100 * low, 100 * high, len(held))


@dataclass(frozen=True)
class Paired:
    """Mean difference over questions that both have, and on how many the first is better, worse and equal."""

    difference: Interval
    better: int
    worse: int
    equal: int


def paired(first: Values, second: Values, seed: int = 0, resamples: int = RESAMPLES) -> Paired:
    """First minus second, question by question (means of each question's values). Raises ValueError without a common question."""
    common = [q for q in first if q in second and len(first[q]) and len(second[q])]
    if not common:
        raise ValueError("a paired difference needs questions that both models were judged on, got none")
    gaps = {q: [float(np.mean(first[q]) - np.mean(second[q]))] for q in common}
    signs = np.sign([gap for (gap,) in gaps.values()])
    return Paired(bootstrap(gaps, seed, resamples), int((signs > 0).sum()), int((signs < 0).sum()), int((signs == 0).sum()))


def refit_interval(rows: int, fit: Callable[[NDArray[np.int64] | None], float], seed: int = 0, resamples: int = 300) -> Interval:
    """An estimate that is a fit and not a mean: `fit(None)` on all rows, `fit(drawn)` on resampled row indices [Q]."""
    rng = np.random.default_rng(seed)
    drawn = np.array([fit(np.sort(rng.integers(0, rows, rows))) for _ in range(resamples)])
    return Interval(fit(None), *_percentiles(drawn), rows)
