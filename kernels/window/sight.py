"""What a token sees: the last `window` tokens and the first `sinks` of its document.

Shapes: T queries, S keys; leading dimensions are free. Tokens are counted within a row; a document starts at `start`.
"""

from typing import NamedTuple

from torch import Tensor

NO_LIMIT = 1 << 30  # tokens


class Sight(NamedTuple):
    """`window` counts the token itself; nothing `reach` tokens back or further is seen (None: no such limit)."""

    window: int
    sinks: int = 0
    reach: int | None = None

    @property
    def whole(self) -> int:
        """How many tokens of a document, its first ones, have nothing out of sight."""
        return NO_LIMIT if self.reach is not None and self.reach <= self.window else self.sinks + self.window


class Past(NamedTuple):
    """Tokens before those of a call: keys and values [B, S, G, P], their places [B or 1, S] (negative: none there), and how many tokens
    each row has had [B or 1]. Held are the last `window` - 1 tokens and the sinks; a token must not stand here twice. `gone` [B, G, P]:
    the sum of the values of all others, those out of sight of every token to come."""

    keys: Tensor
    values: Tensor
    places: Tensor
    length: Tensor
    gone: Tensor


class View(NamedTuple):
    """What tokens see, and what they do not: attention to what they see [B, T, H, P], the logarithm of its softmax's denominator
    [B, T, H] (at least fp32), which tokens have something out of sight [B or 1, T] bool (None: all have), the logarithm of how many
    tokens that is [B or 1, T], and the mean of their values [B, T, G, P]; 0 where it is none. The last two are None where a caller knows
    that nothing is out of sight of any token."""

    seen: Tensor
    lse: Tensor
    far: Tensor | None
    more: Tensor | None
    mean: Tensor | None


class Rest(NamedTuple):
    """Weights of what stands for all that is out of sight: of its score a bias [H] and a factor [H] of the logarithm of how many tokens
    there are, of its value the share [H P] that the mean of theirs has."""

    bias: Tensor
    growth: Tensor
    share: Tensor


class Held(NamedTuple):
    """What rounds over slots read and write: keys and values [B, G, S, P], and of the tokens from the sinks up to before `summed` [B, G]
    the sum of their values `total` [B, G, P], at least fp32."""

    keys: Tensor
    values: Tensor
    total: Tensor
    summed: Tensor


def sees(query: Tensor, start: Tensor, key: Tensor, sight: Sight) -> Tensor:
    """Whether the tokens at query [..., T], of documents from start [..., T], see those at key [..., S]: [..., T, S] bool."""
    back, key, first = query[..., :, None] - key[..., None, :], key[..., None, :], start[..., :, None]
    near = back < sight.window
    if sight.sinks:
        near = near | (key - first < sight.sinks)
    if sight.reach is not None:
        near = near & (back < sight.reach)
    return near & (back >= 0) & (key >= first)
