"""How many tokens to draft: a fixed number, or what a running estimate says is fastest.

With acceptance rate a, a round of K drafted tokens yields E(a, K) = (1 - a^(K + 1)) / (1 - a) tokens (Leviathan et al. 2023,
equation 1) and takes t(K) = t_0 + K t_1 seconds. `Auto` estimates a and t from the rounds so far and takes the K that maximises E / t.
"""

from dataclasses import dataclass, field

MEMORY = 0.97  # weight of the past at each round


def expected_tokens(acceptance: float, count: int) -> float:
    """Tokens that a round of `count` drafted tokens yields on average."""
    return float(count + 1) if acceptance >= 1 else (1 - acceptance ** (count + 1)) / (1 - acceptance)


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
    """The number that the rounds so far say is fastest, 0 .. `most`. `probe`: after that many rounds without drafts, one with them."""

    most: int = 12
    probe: int = 16
    trials: list[int] = field(default_factory=lambda: [6, 2, 4])
    accepted: float = 1.4  # 2 drafts of which 70 % stood, as a start
    offered: float = 2.0
    idle: int = 0

    def __post_init__(self) -> None:
        self.n = self.k = self.kk = self.t = self.kt = 0.0  # sums over rounds of 1, K, K^2, seconds, K seconds

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
        spread = self.n * self.kk - self.k**2
        slope = max((self.n * self.kt - self.k * self.t) / spread, 0.0) if spread > 1e-9 else 0.0
        base = max((self.t - slope * self.k) / self.n, 1e-9)
        rate = min(self.accepted / self.offered, 0.99)
        return max(range(self.most + 1), key=lambda count: expected_tokens(rate, count) / (base + slope * count))

    def learn(self, count: int, accepted: list[int], drafted: list[int], seconds: float) -> None:
        """Note a round: `count` tokens were asked for, row b drafted drafted[b] and kept accepted[b], all of it took `seconds`."""
        if self.trials:
            self.trials.pop()
        for name, value in (("n", 1.0), ("k", count), ("kk", count**2), ("t", seconds), ("kt", count * seconds)):
            setattr(self, name, getattr(self, name) * MEMORY + value)
        tried = [kept + (kept < made) for kept, made in zip(accepted, drafted, strict=True)]  # the first rejection is a trial too
        if sum(tried):
            self.accepted = self.accepted * MEMORY + sum(accepted)
            self.offered = self.offered * MEMORY + sum(tried)
