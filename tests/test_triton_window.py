"""A round over keys and values in slots, in the interpreter and in PyTorch, against attention over whole sequences in fp64."""

import pytest
import torch
from torch import Tensor
from triton_tools import needs_interpreter

from llamba.kernels.decode import commit, cursors, plan
from llamba.kernels.window import Sight, turned, window_attention, window_steps

pytestmark = needs_interpreter
B, H, G, P, Q, ROUND = 2, 4, 2, 6, 4, 3


def _angles(places: Tensor) -> tuple[Tensor, Tensor]:
    angle = places[..., None] * torch.tensor([0.7, 0.1])
    return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("sight", [Sight(5, 2), Sight(1, 3), Sight(4), Sight(7, 2, 9)], ids=str)
def test_rounds_with_tokens_taken_back_equal_the_sequence(sight: Sight, impl: str) -> None:
    """Rows use and keep numbers of tokens of their own; slots that nothing was written to are NaN."""
    draw, at = torch.Generator().manual_seed(0), cursors(B, "cpu")
    slots = sight.sinks + sight.window + 2 * ROUND
    keys, values = torch.full((2, B, G, slots, P), float("nan")).unbind()
    kept_heads, got = [torch.empty(0, 2 * G + H, P)] * B, [torch.empty(0, H * P)] * B
    for _ in range(14):
        heads, mass, y = (torch.randn(B, ROUND, *shape, generator=draw) for shape in ((2 * G + H, P), (H,), (H * P,)))
        new = torch.randint(1, ROUND + 1, (B,), generator=draw)
        plan(at, new, ROUND, 16, False)
        out = window_steps(
            heads, mass, y, _angles(at.length[:, None] + torch.arange(ROUND)), keys.nan_to_num_() if impl == "torch" else keys,
            values.nan_to_num_() if impl == "torch" else values, at, sight, P**-0.5, impl=impl,
        )  # fmt: skip
        read = at.length[:, None] + torch.arange(1, ROUND + 1) - sight.sinks > sight.window  # more than sinks and window hold
        seen = torch.where(read[..., None], out - y, out).unflatten(-1, (H, P)) / (1 - mass * read[..., None])[..., None]
        kept = torch.minimum(new, torch.randint(1, ROUND + 1, (B,), generator=draw))
        for row in range(B):
            assert not out[row, new[row] :].any()
            kept_heads[row] = torch.cat((kept_heads[row], heads[row, : kept[row]]))
            got[row] = torch.cat((got[row], seen[row, : kept[row]].flatten(1)))
        commit(at, kept)
    for row in range(B):
        whole = kept_heads[row][None].double()
        assert whole.shape[1] > sight.sinks + sight.window, "the walk is long enough to turn"
        v, k, q = whole.split([G, G, H], 2)
        cos, sin = (part.double()[None] for part in _angles(torch.arange(whole.shape[1])))
        want = window_attention(turned(q, cos, sin), turned(k, cos, sin), v, sight, scale=P**-0.5, impl="sequential")[0].flatten(1)
        assert (got[row] - want).abs().max() < 2e-4 * want.abs().max()


def test_too_few_slots_are_one_line() -> None:
    heads, keys = torch.zeros(B, ROUND, 2 * G + H, P), torch.zeros(B, G, 7, P)
    angles = _angles(torch.zeros(B, ROUND))
    with pytest.raises(ValueError, match=r"3 tokens need sinks \+ window \+ T = 8 slots; got 7"):
        window_steps(
            heads, torch.zeros(B, ROUND, H), torch.zeros(B, ROUND, H * P), angles, keys, keys.clone(), cursors(B, "cpu"), Sight(4, 1), 1.0
        )
