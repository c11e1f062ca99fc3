"""Window and sinks: blocks of queries against one full mask."""

import pytest
import torch
from torch import Tensor

from llamba.kernels.window import Past, Sight, View, turned, window_rows, window_view

SIGHTS = [Sight(1), Sight(3), Sight(16, 2), Sight(64, 4), Sight(1, 4), Sight(8, 3, 11), Sight(40, 5, 20), Sight(7, 60)]
B, H, G, P = 2, 4, 2, 8
SCALE = P**-0.5


def heads(T: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k and v of T tokens."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, n, P, dtype=torch.float64, generator=draw).to(dtype) for n in (H, G, G)]


def truth(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> View:
    """One document, token by token, as the words say. Where a layer slides within its window, nothing is out of sight."""
    y, lse, mean = torch.zeros_like(q), torch.zeros_like(q[..., 0]), torch.zeros_like(v)
    count = torch.zeros(1, q.shape[1], dtype=torch.long)
    k, wide = (part.repeat_interleave(H // G, 2) for part in (k, v))
    for t in range(q.shape[1]):
        near = [s for s in range(t + 1) if t - s < sight.window or s < sight.sinks]
        seen = [s for s in near if sight.reach is None or t - s < sight.reach]
        far = [] if sight.reach is not None and sight.reach <= sight.window else [s for s in range(t + 1) if s not in near]
        scores = (k[:, seen] * q[:, t, None]).sum(-1) * SCALE  # [B, S, H]
        y[:, t] = (scores.softmax(1)[..., None] * wide[:, seen]).sum(1)
        lse[:, t], count[:, t] = scores.exp().sum(1).log(), len(far)
        mean[:, t] = v[:, far].mean(1) if far else 0
    return View(y, lse, count > 0, count.clamp_min(1).double().log(), mean)


def rows_of(view: View) -> View:
    """With what is said of tokens said of every row's."""
    return view._replace(far=view.far.expand(B, -1), more=view.more.expand(B, -1))


def check(got: View, want: View) -> None:
    """All parts of both are the same."""
    assert torch.equal(got.far, want.far)
    for one, other in zip(got._replace(far=got.seen), want._replace(far=want.seen), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", ["sequential", "torch"])
@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("T", [1, 31, 150])
def test_what_is_seen_is_what_the_words_say(T: int, sight: Sight, impl: str) -> None:
    q, k, v = heads(T)
    for gradients in (True, False):  # in whose absence a CPU has an attention of its own
        with torch.set_grad_enabled(gradients):
            check(rows_of(window_view(q, k, v, sight, scale=SCALE, impl=impl)), rows_of(truth(q, k, v, sight)))


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("how", ["documents", "mask", "both"])
def test_packed_and_padded_rows_equal_single_documents(how: str, sight: Sight) -> None:
    lengths = [1, 43, 3, 2, 50] if how != "mask" else [99]
    singles = [heads(length, seed) for seed, length in enumerate(lengths)]
    packed = [torch.cat(parts, 1) for parts in zip(*singles, strict=True)]
    numbers = torch.cat([torch.full((B, length), number) for number, length in enumerate(lengths)], 1)
    want = View(*(torch.cat(parts, 1) for parts in zip(*(rows_of(truth(*single, sight)) for single in singles), strict=True)))
    mask = None
    if how != "documents":
        mask = torch.rand(B, 140, generator=torch.Generator().manual_seed(1)).argsort(1) < 99  # holes anywhere
        packed = [
            torch.full((B, 140, *part.shape[2:]), 9.0, dtype=part.dtype).masked_scatter(mask[..., None, None], part) for part in packed
        ]
        numbers = torch.zeros(B, 140, dtype=torch.long).masked_scatter(mask, numbers).cummax(1).values
    for impl in ("sequential", "torch"):
        got = rows_of(window_view(*packed, sight, scale=SCALE, mask=mask, seq_idx=None if how == "mask" else numbers, impl=impl))
        if mask is not None:
            assert all(bool((part[~mask] == 0).all()) for part in got)
            got = View(*(part[mask].view(other.shape) for part, other in zip(got, want, strict=True)))
        check(got, want)
    matrix = window_rows(packed[0], packed[1], sight, SCALE, None if how == "mask" else numbers, mask, slice(None))
    product = torch.einsum("bhij,bjhp->bihp", matrix, packed[2].repeat_interleave(H // G, 2))
    product = product if mask is None else product[mask].view(want.seen.shape)
    torch.testing.assert_close(product, want.seen, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize(("held", "T"), [(0, 5), (2, 80), (7, 140), (90, 1), (90, 80)])
def test_a_past_and_what_follows_equal_the_whole(held: int, T: int, sight: Sight) -> None:
    """Rows have had `held` and held + 3 tokens; what neither window nor sinks can see is not there, or garbage."""
    whole = heads(held + 3 + T)
    want = rows_of(truth(*whole, sight))
    lengths = torch.tensor([held, held + 3])
    places = torch.arange(held + 3).expand(2, -1).clone()
    far = (places >= sight.sinks) & (places <= lengths[:, None] - sight.window)
    gone = (whole[2][:, : held + 3] * far[..., None, None]).sum(1)
    places[far] = -1
    places[places >= lengths[:, None]] = -7
    old = [part[:, : held + 3].masked_fill((places < 0)[..., None, None], 5.0) for part in whole[1:]]
    new = [torch.stack([row[n : n + T] for row, n in zip(part, lengths.tolist(), strict=True)]) for part in whole]
    for impl in ("sequential", "torch"):
        got = window_view(*new, sight, scale=SCALE, past=Past(*old, places, lengths, gone), impl=impl)
        for row, n in enumerate(lengths.tolist()):
            check(View(*(part[row] for part in rows_of(got))), View(*(part[row, n : n + T] for part in want)))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_the_blocks(packed: bool) -> None:
    parts, ups = (
        [part.requires_grad_() for part in heads(150)],
        [torch.randn(B, 150, *more, dtype=torch.float64) for more in ((H, P), (H,), (G, P))],
    )
    numbers = (torch.arange(150) // 55).expand(B, -1) if packed else None
    found = []
    for impl in ("sequential", "torch"):
        view = window_view(*parts, Sight(20, 3), scale=SCALE, seq_idx=numbers, impl=impl)
        found.append(
            torch.autograd.grad(sum((part * up).sum() for part, up in zip((view.seen, view.lse, view.mean), ups, strict=True)), parts)
        )
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_narrow_numbers(dtype: torch.dtype, bound: float) -> None:
    q, k, v = heads(200, dtype=dtype)
    want = window_view(q.double(), k.double(), v.double(), Sight(16, 2), scale=SCALE, impl="sequential")
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            got = window_view(q, k, v, Sight(16, 2), scale=SCALE)
        assert got.seen.dtype == got.mean.dtype == dtype and got.lse.dtype == torch.float32
        assert torch.equal(got.far, want.far) and all(
            (one - other).abs().max() < bound for one, other in zip(got[3:], want[3:], strict=True)
        )
        assert (got.seen - want.seen).abs().max() < bound
        assert (got.lse - want.lse).abs().max() < (1e-5 if gradients or dtype == torch.float32 else 1e-4)


def test_turning_some_of_the_coordinates() -> None:
    """A pair (i, i + Q/2) is turned by its angle, as complex numbers are."""
    x, angle = heads(5)[0], torch.rand(1, 5, 2, dtype=torch.float64) * 6
    cos, sin = (torch.cat((part, part), -1) for part in (angle.cos(), angle.sin()))
    pairs = torch.complex(x[..., :2], x[..., 2:4]) * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    want = torch.cat((pairs.real, pairs.imag, x[..., 4:]), -1)
    torch.testing.assert_close(turned(x, cos, sin), want)


def test_wrong_shapes_are_one_line() -> None:
    q, k, v = heads(4)
    with pytest.raises(ValueError, match=r"v must have shape \[2, 4, 2, 8\]"):
        window_view(q, k, v[:, :3], Sight(2), scale=1.0)
    with pytest.raises(ValueError, match="impl must be one of"):
        window_view(q, k, v, Sight(2), scale=1.0, impl="cuda")
    with pytest.raises(ValueError, match="a multiple of k's 2 heads, got 3"):
        window_view(q[:, :, :3], k, v, Sight(2), scale=1.0)
    past = Past(k, v, torch.arange(4)[None], torch.tensor([4]), torch.zeros(B, G, P))
    with pytest.raises(ValueError, match="exclude each other"):
        window_view(q, k, v, Sight(2), scale=1.0, seq_idx=torch.zeros(2, 4, dtype=torch.long), past=past)
