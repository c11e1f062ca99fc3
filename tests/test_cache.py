"""Rollback of recurrent layers: a long random walk of ragged acceptance, and the two kernels that it stands on."""

import pytest
import torch
from models import DELTA_RULES, OPTIONS, SHAPE, STUDENTS, ids, open_join, rms_error
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llamba.kernels.conv1d import causal_conv1d, causal_conv1d_span
from llamba.kernels.ssd import ssd, ssd_fold, ssd_resume
from llamba.models.adoption import adopt
from llamba.models.cache import KEPT, SLOTS
from llamba.models.convert import convert

ROWS, ROUNDS = 2, 200


def two_layers(mixer: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16}, num_key_value_heads=2)
    kind, options = OPTIONS.get(mixer, (mixer, {}))
    made = convert(LlamaForCausalLM(config).double(), mixer=kind, attention=0.0, init="paper", options=options)
    for layer in made.model.layers:
        open_join(layer.self_attn)
    return made


@torch.no_grad()
def states(model: PreTrainedModel, row: torch.Tensor) -> list[torch.Tensor]:
    """States after one row of tokens, from scratch."""
    return [layer.state[0] for layer in model(row[None]).past_key_values.layers]


@torch.no_grad()
@pytest.mark.parametrize("mixer", (*STUDENTS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in DELTA_RULES)))
def test_states_of_a_ragged_random_walk_equal_those_from_scratch_at_every_round(mixer: str) -> None:
    """Rows accept different numbers of tokens, folds happen, now and then rows are reordered; settled and open tokens alternate."""
    model, draw = two_layers(mixer), torch.Generator().manual_seed(3)
    cache = adopt(DynamicCache(config=model.config), model.config)
    model(ids(ROWS, 2), past_key_values=cache)
    cache.activate_past_recording()
    kept, folds = list(ids(ROWS, 2)), 0
    for round_ in range(ROUNDS):
        count = int(torch.randint(1, 9, (), generator=draw))
        tokens, before = ids(ROWS, count, seed=round_), cache.layers[0].counts
        model(tokens, position_ids=torch.tensor([[len(row)] for row in kept]) + torch.arange(count), past_key_values=cache)
        folds += any(now < old + count for now, old in zip(cache.layers[0].counts, before, strict=True))
        back = torch.randint(0, count + 1, (ROWS,), generator=draw).tolist()
        for layer in cache.layers:
            layer.take_back(back)
            if round_ % 50 < 25:
                layer.pin()
        kept = [torch.cat((old, new[: count - b])) for old, new, b in zip(kept, tokens, back, strict=True)]
        if round_ % 20 == 19:
            order = torch.randperm(ROWS, generator=draw)
            cache.reorder_cache(order)
            kept = [kept[i] for i in order.tolist()]
        for row, tokens_so_far in enumerate(kept):
            mixers = [layer.self_attn for layer in model.model.layers]
            for layer, own, want in zip(cache.layers, mixers, states(model, tokens_so_far), strict=True):
                held = tuple(buffer[row : row + 1, : layer.counts[row]] for buffer in layer.held)
                got = own._advance(held, None, layer.state[row : row + 1]) if layer.counts[row] else layer.state[row : row + 1]
                assert rms_error(got[0], want) < 1e-11, (round_, row)
    assert folds >= 5


def places(mask: torch.Tensor) -> torch.Tensor:
    """Positions [B, T] of real tokens among themselves."""
    return (mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
@pytest.mark.parametrize("mixer", (*STUDENTS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in DELTA_RULES)))
def test_taking_back_tokens_among_which_some_were_absent(mixer: str) -> None:
    model = two_layers(mixer)
    cache = adopt(DynamicCache(config=model.config), model.config)
    cache.activate_past_recording()
    tokens, draw, real = ids(2, 0), torch.Generator().manual_seed(0), torch.ones(2, 0, dtype=torch.long)
    for length, back in ((3, 1), (50, 7), (4, 4), (6, 0), (5, 3)):
        new, mask = ids(2, length, seed=length), (torch.rand(2, length, generator=draw) < 0.6).long()
        both = torch.cat((real, mask), 1)
        model(new, attention_mask=both, position_ids=places(both)[:, -length:], past_key_values=cache)
        cache.crop(-back)
        tokens, real = (torch.cat((old, more[:, : length - back]), 1) for old, more in ((tokens, new), (real, mask)))
    last = torch.cat((real, torch.ones(2, 2, dtype=torch.long)), 1)
    got = model(ids(2, 2), position_ids=places(last)[:, -2:], past_key_values=cache).logits
    for row in range(2):
        kept = torch.cat((tokens[row][real[row].bool()], ids(2, 2)[row]))
        assert rms_error(got[row], model(kept[None]).logits[0, -2:]) < 1e-11


def test_what_is_settled_or_folded_cannot_be_taken_back() -> None:
    model = two_layers("mamba2")
    cache = adopt(DynamicCache(config=model.config), model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids(2, SLOTS), past_key_values=cache)
    layer = cache.layers[0]
    layer.take_back([3, 1])
    assert layer.counts == [KEPT - 3, KEPT - 1]
    with pytest.raises(ValueError, match=f"cannot take back 30 tokens: a recurrent layer holds at most the last {KEPT}"):
        layer.take_back([30, 30])
    layer.pin()
    with pytest.raises(ValueError, match="cannot take back 1 tokens"):
        layer.take_back([1, 0])


@pytest.mark.parametrize("firsts", [0, 5, [0, 7]])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_resume_equals_the_recurrence(firsts: int | list[int], scaled: bool, dtype: torch.dtype, bound: float) -> None:
    draw = torch.Generator().manual_seed(0)
    B, S, T, H, G, P, N = 2, 12, 4, 4, 2, 3, 5

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    x, b, c_all, state, skip = random(B, S, G, P), random(B, S, G, N), random(B, S, H, N), random(B, H, P, N), random(H)
    a, dt = -random(B, S, H).abs(), random(B, S, H).abs() if scaled else None
    first = torch.tensor(firsts) if isinstance(firsts, list) else firsts
    starts = firsts if isinstance(firsts, list) else [firsts] * B
    c = torch.stack([row[start : start + T] for row, start in zip(c_all, starts, strict=True)])
    used = max(starts) + T
    slots = [t[:, :used] for t in (x, a, b)]
    got = ssd_resume(*slots, c, firsts=first, dt=None if dt is None else dt[:, :used], D=skip, state=state)
    want = ssd(x, a, b, c_all, dt=dt, D=skip, state=state, impl="sequential")[0]
    for row, start in enumerate(starts):
        assert rms_error(got[row], want[row, start : start + T]) < bound


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_fold_equals_the_state_of_the_recurrence(holes: bool, scaled: bool, dtype: torch.dtype, bound: float) -> None:
    draw = torch.Generator().manual_seed(0)
    B, S, H, G, P, N = 2, 12, 4, 2, 3, 5

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    x, b, c, before = random(B, S, G, P), random(B, S, G, N), random(B, S, H, N), random(B, H, P, N)
    a, dt = -random(B, S, H).abs(), random(B, S, H).abs() if scaled else None
    mask = torch.rand(B, S, generator=draw) < 0.6 if holes else None
    for state in (before, None):
        want = ssd(x, a, b, c, dt=dt, state=state, mask=mask, impl="sequential")[1]
        assert rms_error(ssd_fold(x, a, b, dt=dt, mask=mask, state=state), want) < bound
    with pytest.raises(ValueError, match="b must have shape"):
        ssd_fold(x, a, b[:, 1:])


def test_resume_and_span_refuse_shapes_that_do_not_fit() -> None:
    x, a, b, c = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 4), torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match="a must have shape"):
        ssd_resume(x, a[..., :2], b, c, firsts=1)
    with pytest.raises(ValueError, match="multiple of G"):
        ssd_resume(x, a, b, c[:, :, :3], firsts=1)
    with pytest.raises(ValueError, match="T must be at least 1"):
        causal_conv1d_span(torch.zeros(1, 3, 5), torch.zeros(5, 4))


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("width", [1, 4])
def test_a_span_is_the_convolution_behind_a_window(activation: str | None, width: int) -> None:
    draw = torch.Generator().manual_seed(0)
    span, weight, bias = (torch.randn(*shape, generator=draw).double() for shape in ((2, width + 4, 6), (6, width), (6,)))
    want, _ = causal_conv1d(span[:, width - 1 :], weight, bias, activation=activation, state=span[:, : width - 1], impl="sequential")
    assert rms_error(causal_conv1d_span(span, weight, bias, activation=activation), want) < 1e-14
