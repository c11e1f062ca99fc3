"""How many tokens to draft: a fixed number, or what a running estimate says is fastest.

Where the i-th draft of a round stands with chance s_i, if those before it do, a round of K drafted tokens yields E(K) = 1 + s_1 + s_1 s_2
+ ... + s_1 ... s_K tokens (with one chance for all, equation 1 of Leviathan et al. 2023) and takes t(K) = t_0 + K t_1 seconds. `Auto`
estimates both from the rounds so far and takes the K that maximises E / t.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, combinations
from operator import mul
from statistics import median
from typing import Any

from llamba.models.cache import KEPT

MEMORY = 0.985  # weight of the past at each round
RECENT = 9  # rounds with the same number whose times count
PRIOR = 4.0  # drafts that every place is taken to have seen, which stood as often as those of all places


@dataclass
class Fixed:
    """The same number in each round."""

    count: int

    @property
    def most(self) -> int:
        """The largest number that `next` may say."""
        return self.count

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
    idle: int = 0
    stood: list[float] = field(default_factory=list)  # by place in the round: drafts that stood, of those before which all did
    offered: list[float] = field(default_factory=list)
    seconds: dict[int, deque[float]] = field(default_factory=lambda: defaultdict(partial(deque, maxlen=RECENT)))

    def __post_init__(self) -> None:
        self.stood, self.offered = self.stood or [0.0] * self.most, self.offered or [0.0] * self.most

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
        tokens = accumulate(accumulate(self._chances(), mul, initial=1.0))  # E of 0, 1, ...
        speeds = [expected / (base + slope * count) for count, expected in enumerate(tokens)]
        return speeds.index(max(speeds))

    def _chances(self) -> list[float]:
        """s_1, s_2, ...: of 2 drafts 1.4 stood, as a start."""
        overall = (sum(self.stood) + 1.4) / (sum(self.offered) + 2)
        return [(stood + PRIOR * overall) / (offered + PRIOR) for stood, offered in zip(self.stood, self.offered, strict=True)]

    def _costs(self) -> tuple[float, float]:
        """t_0 and t_1: a line through the medians by Theil and Sen: rounds that other work held up hardly move it."""
        points = [(count, median(times)) for count, times in self.seconds.items()]
        slopes = [(later - t) / (more - count) for (count, t), (more, later) in combinations(points, 2)]
        slope = max(median(slopes), 0.0) if slopes else 0.0
        return max(median(t - slope * count for count, t in points), 1e-9), slope

    def learn(self, count: int, accepted: list[int], drafted: list[int], seconds: float) -> None:
        """Note a round: `count` tokens were asked for, row b drafted drafted[b] and kept accepted[b], all of it took `seconds`."""
        if self.trials:
            self.trials.pop()
        self.seconds[count].append(seconds)
        self.stood, self.offered = ([MEMORY * value for value in values] for values in (self.stood, self.offered))
        for kept, made in zip(accepted, drafted, strict=True):
            for place in range(min(kept + 1, made, self.most)):  # the first rejection is a trial too
                self.stood[place] += place < kept
                self.offered[place] += 1


def schedule(given: Any) -> Fixed | Auto:
    """What a user's `lookahead` means: a number, "auto", or an `Auto` that has learnt already. Raises ValueError for anything else."""
    if isinstance(given, Auto):
        return given
    if given == "auto":
        return Auto()
    if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given < KEPT:
        raise ValueError(f'lookahead must be 1 to {KEPT - 1} (the cache holds the last {KEPT} tokens) or "auto"; got {given!r}')
    return Fixed(given)
