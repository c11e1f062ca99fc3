"""How many tokens to draft: a fixed number, or what a running estimate says is fastest.

With acceptance rate a, a round of K drafted tokens yields E(a, K) = (1 - a^(K + 1)) / (1 - a) tokens (Leviathan et al. 2023,
equation 1) and takes t(K) = t_0 + K t_1 seconds. `Auto` estimates a and t from the rounds so far and takes the K that maximises E / t.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from llamba.cache import KEPT

MEMORY = 0.97  # weight of the past at each round
RECENT = 9  # rounds with the same number whose times count


def expected_tokens(acceptance: float, count: int) -> float:
    """Tokens that a round of `count` drafted tokens yields on average."""
    return float(count + 1) if acceptance >= 1 else (1 - acceptance ** (count + 1)) / (1 - acceptance)


@dataclass
class Fixed:
    """The same number in each round."""

    count: int

    def next(self) -> int:
        """Tokens to draft in the next round."""
        return self.count

    def learn(self, count: int, accepted: list[int], drafted: list[int], seconds: float) -> None:
        """A fixed number learns nothing."""


@dataclass
class Auto:
    """The number that the rounds so far say is fastest, 0 .. `most`. `probe`: after that many rounds without drafts, one with them.

    It keeps what it has learnt: one object may serve many calls of `generate` with the same models, and then tries out once.
    """

    most: int = 12
    probe: int = 16
    trials: list[int] = field(default_factory=lambda: [6, 2, 4])
    accepted: float = 1.4  # 2 drafts of which 70 % stood, as a start
    offered: float = 2.0
    idle: int = 0
    seconds: dict[int, deque[float]] = field(default_factory=lambda: defaultdict(partial(deque, maxlen=RECENT)))

    def next(self) -> int:
        """Tokens to draft in the next round. The first rounds try different numbers, so that the costs can be told apart."""
        if self.trials:
            return self.trials[-1]
        best = self._best()
        self.idle = 0 if best else self.idle + 1
        if self.idle > self.probe:
            self.idle = 0
            return 2
        return best

    def _best(self) -> int:
        base, slope = self._costs()
        rate = min(self.accepted / self.offered, 0.99)
        return max(range(self.most + 1), key=lambda count: expected_tokens(rate, count) / (base + slope * count))

    def _costs(self) -> tuple[float, float]:
        """t_0 and t_1: a weighted line through the medians, which a moment of other work on the machine hardly moves."""
        points = [(len(times), count, median(times)) for count, times in self.seconds.items()]
        weight = sum(w for w, _, _ in points)
        k, t = (sum(point[0] * point[axis] for point in points) / weight for axis in (1, 2))
        spread = sum(w * (count - k) ** 2 for w, count, _ in points)
        slope = max(sum(w * (count - k) * (time - t) for w, count, time in points) / spread, 0.0) if spread else 0.0
        return max(t - slope * k, 1e-9), slope

    def learn(self, count: int, accepted: list[int], drafted: list[int], seconds: float) -> None:
        """Note a round: `count` tokens were asked for, row b drafted drafted[b] and kept accepted[b], all of it took `seconds`."""
        if self.trials:
            self.trials.pop()
        self.seconds[count].append(seconds)
        tried = [kept + (kept < made) for kept, made in zip(accepted, drafted, strict=True)]  # the first rejection is a trial too
        if sum(tried):
            self.accepted = self.accepted * MEMORY + sum(accepted)
            self.offered = self.offered * MEMORY + sum(tried)


def schedule(given: Any) -> Fixed | Auto:
    """What a user's `lookahead` means: a number, "auto", or an `Auto` that has learnt already. Raises ValueError for anything else."""
    if isinstance(given, Auto):
        return given
    if given == "auto":
        return Auto()
    if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given < KEPT:
        raise ValueError(f'lookahead must be 1 to {KEPT - 1} (the cache holds the last {KEPT} tokens) or "auto"; got {given!r}')
    return Fixed(given)
