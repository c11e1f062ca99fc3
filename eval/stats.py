"""Statistics of scores: intervals by bootstrap over questions, and paired differences.

A question is the unit: all its values (both turns, all repeats) are drawn together. Q questions, R resamples.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95

Values = Mapping[Hashable, Sequence[float]]  # question -> its values


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
    """Mean over all values with its percentile interval; questions are drawn, not values. Raises ValueError without any value."""
    held = [np.asarray(v, dtype=float) for v in values.values() if len(v)]
    if not held:
        raise ValueError("a score needs at least one question that was judged, got none")
    sums, counts = np.array([v.sum() for v in held]), np.array([float(v.size) for v in held])
    weights = draws(len(held), seed, resamples)
    return Interval(float(sums.sum() / counts.sum()), *_percentiles((weights @ sums) / (weights @ counts)), len(held))


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
