"""A round over keys and values in slots, in the interpreter and in PyTorch, against attention over whole sequences in fp64."""

import pytest
import torch
from torch import Tensor
from triton_tools import needs_interpreter

from llamba.kernels.decode import commit, cursors, plan
from llamba.kernels.window import Held, Rest, Sight, turned, window_steps, window_view

pytestmark = needs_interpreter
B, H, G, P, Q, ROUND, BACK = 2, 4, 2, 6, 4, 3, 5


def _angles(places: Tensor) -> tuple[Tensor, Tensor]:
    angle = places[..., None] * torch.tensor([0.7, 0.1])
    return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()


def _held(slots: int) -> Held:
    """Empty slots, which hold NaN."""
    keys, values = torch.full((2, B, G, slots, P), float("nan")).unbind()
    return Held(keys, values, torch.zeros(B, G, P), torch.zeros(B, G, dtype=torch.long))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("sight", [Sight(5, 2), Sight(1, 3), Sight(4), Sight(7, 2, 9), Sight(4, 1, 4)], ids=str)
def test_rounds_with_tokens_taken_back_equal_the_sequence(sight: Sight, impl: str) -> None:
    """Rows use and keep numbers of tokens of their own; slots that nothing was written to are NaN."""
    draw, at = torch.Generator().manual_seed(0), cursors(B, "cpu")
    held, highest = _held(sight.sinks + sight.window + ROUND + BACK), torch.zeros(B, dtype=torch.long)
    rest = Rest(*(torch.randn(size, generator=draw) for size in (H, H, H * P)))
    got = [torch.empty(0, H * P)] * B
    kept_tokens = [[torch.empty(0, *shape) for shape in ((2 * G + H, P), (H,), (H * P,))] for _ in range(B)]
    for number in range(36):
        tokens = [torch.randn(B, ROUND, *shape, generator=draw) for shape in ((2 * G + H, P), (H,), (H * P,))]
        new = torch.randint(1, ROUND + 1, (B,), generator=draw)
        plan(at, new, ROUND, 16, False)
        if impl == "torch":
            held.keys.nan_to_num_(), held.values.nan_to_num_()
        angles = _angles(at.length[:, None] + torch.arange(ROUND))
        out = window_steps(*tokens, rest, angles, held, at, sight, P**-0.5, impl=impl)
        kept = torch.minimum(new, torch.randint(1, ROUND + 1, (B,), generator=draw))
        for row in range(B):
            assert not out[row, new[row] :].any()
            kept_tokens[row] = [torch.cat((old, part[row, : kept[row]])) for old, part in zip(kept_tokens[row], tokens, strict=True)]
            got[row] = torch.cat((got[row], out[row, : kept[row]]))
        highest = torch.maximum(highest, at.length + ROUND)
        commit(at, kept)
        for row in range(B):  # as a draft's cursor goes back over several rounds: what the slots hold allows so much
            least = max(int(highest[row]) - ROUND - BACK, 0)
            back = (
                int(torch.randint(0, max(int(at.length[row]) - least, 0) + 1, (), generator=draw)) if number % 3 == 0 and number < 24 else 0
            )
            at.length[row] -= back
            left = len(got[row]) - back
            kept_tokens[row], got[row] = [part[:left] for part in kept_tokens[row]], got[row][:left]
    for row in range(B):
        whole, scores, y = (part[None].double() for part in kept_tokens[row])
        T = whole.shape[1]
        assert T > 2 * (sight.sinks + sight.window), "the walk is long enough to turn"
        v, k, q = whole.split([G, G, H], 2)
        cos, sin = (part.double()[None] for part in _angles(torch.arange(T)))
        view = window_view(turned(q, cos, sin), turned(k, cos, sin), v, sight, scale=P**-0.5, impl="sequential")
        score = scores + rest.bias + rest.growth * view.more[..., None]
        mass = torch.where(view.far[..., None], torch.sigmoid(score - view.lse), 0)[..., None]
        value = (y + (view.mean.repeat_interleave(H // G, 2).flatten(2) * rest.share)).unflatten(-1, (H, P))
        want = ((1 - mass) * view.seen + mass * value).flatten(2)[0]
        assert (got[row] - want).abs().max() < 1e-4 * want.abs().max()
        assert sight.reach == 4 or ((mass > 0.01) & (mass < 0.99)).double().mean() > 0.3, "both sides count"


def test_too_few_slots_are_one_line() -> None:
    heads, rest = torch.zeros(B, ROUND, 2 * G + H, P), Rest(torch.zeros(H), torch.zeros(H), torch.zeros(H * P))
    angles = _angles(torch.zeros(B, ROUND))
    with pytest.raises(ValueError, match=r"3 tokens need sinks \+ window \+ T = 8 slots; got 7"):
        window_steps(
            heads, torch.zeros(B, ROUND, H), torch.zeros(B, ROUND, H * P), rest, angles, _held(7), cursors(B, "cpu"), Sight(4, 1), 1.0
        )
