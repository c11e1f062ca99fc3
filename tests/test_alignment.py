"""Alignment: attention's rows, mixing matrices, their distance, and one layer's graph at a time, each against another way to compute it."""

import weakref

import pytest
import torch
from models import TEACHERS, ids, student, teacher
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from llamba.models.activations import CAPTURED, capture
from llamba.models.masks import document_numbers
from llamba.models.mixers import Mixing, Recurrence
from llamba.training import layer_distances as alignment
from llamba.training.layer_distances import Part, norm, one_graph_at_a_time, squared_distance

MATRIX_MIXERS = ("mamba2", "discrete_mamba2", "low_rank", "toeplitz", "gated_delta", "mamba3")
T = 40


def layouts() -> dict[str, dict[str, Tensor]]:
    """Inputs of two rows: plain, padded left and right, with a hole, packed."""
    holes = torch.ones(2, T, dtype=torch.long)
    holes[0, 5:9] = holes[1, 20] = 0
    left, right = torch.ones_like(holes), torch.ones_like(holes)
    left[0, :13] = right[0, 27:] = 0
    masks = {"left": left, "right": right, "holes": holes}
    packed = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((3, 30, 7), (39, 1))])
    made = {name: {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)} for name, mask in masks.items()}
    return {"plain": {}, "packed": {"position_ids": packed}} | made


LAYOUTS = layouts()
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def recurrence(layout: str) -> Recurrence:
    given = LAYOUTS[layout]
    mask = given["attention_mask"].bool() if "attention_mask" in given else None
    return Recurrence(mask, document_numbers(None, given.get("position_ids"), mask))


def sliding_qwen2():
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=101)
    window = dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    return Qwen2ForCausalLM(Qwen2Config(**shape, **window, initializer_range=0.15)).double().eval()


# attention's rows


@pytest.mark.parametrize("name", [*TEACHERS, "qwen2-sliding"])
@every_layout
def test_rows_from_queries_and_keys_are_the_models_own_attention(name: str, layout: str) -> None:
    """Oracle: transformers' eager attention with output_attentions (its softmax is fp32; in fp64 it makes NaN of padding)."""
    dtype, bound = (torch.float32, 5e-5) if "attention_mask" in LAYOUTS[layout] else (torch.float64, 2e-6)
    model = (sliding_qwen2() if name == "qwen2-sliding" else teacher(name)).to(dtype)
    inputs, rec = {"input_ids": ids(2, T), **LAYOUTS[layout]}, recurrence(layout)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(**inputs, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(CAPTURED)
    heard = capture(model, inputs, scores=range(4))
    real = torch.ones(2, T, dtype=torch.bool) if rec.mask is None else rec.mask
    for index in range(4):
        mixing = heard.scores[index].mixing(rec)
        got = torch.cat([mixing.rows(mixing.inputs, torch.arange(T)[first : first + 7]) for first in range(0, T, 7)], 2)
        wanted = want[index] * (real[:, None, :, None] & real[:, None, None])
        assert (got - wanted).abs().max() < bound, index
    if name in ("mistral", "qwen2-sliding"):
        assert {scores.window for scores in heard.scores.values()} == ({16} if name == "mistral" else {None, 8})


def test_the_record_holds_the_residual_stream_and_the_mixers_outputs() -> None:
    model, tokens = teacher("phi"), ids(2, 9)
    heard = capture(model, {"input_ids": tokens}, mixed=[1])
    with torch.no_grad():
        want = model(tokens, output_hidden_states=True).hidden_states
        for got, expected in zip(heard.streams, want[:-1], strict=False):
            assert torch.equal(got, expected)
        assert len(heard.streams) == 5 and torch.equal(model.model.final_layernorm(heard.streams[4]), want[4])
        layer = model.model.layers[1]
        rest = heard.streams[2] - heard.streams[1] - layer.mlp(layer.input_layernorm(heard.streams[1]))
    assert (heard.mixed[1] - rest).abs().max() < 1e-12
    assert not model.model.layers[0]._forward_pre_hooks and set(heard.mixed) == {1} and not heard.scores


# mixers' matrices


@pytest.mark.parametrize("kind", MATRIX_MIXERS)
@every_layout
def test_the_matrix_times_x_is_the_recurrence(kind: str, layout: str) -> None:
    """Oracle: the mixer's own scan, without gate, norm and projection."""
    mixer, rec = student(kind, attention=0.0).model.layers[1].self_attn, recurrence(layout)
    u = torch.randn(2, T, 32, dtype=torch.float64)
    with torch.no_grad():
        parts = mixer._project(u)
        want, _, _ = mixer._run(parts, rec, None, None)
        x, _, _ = mixer.heads_of(mixer._convolve(parts, rec, None)[0], parts)
        mixing = mixer.mixing(u, rec)
        rows = torch.randperm(T)
        got = mixing.rows(mixing.inputs, rows) @ x.repeat_interleave(2, 2).transpose(1, 2)  # [B, H, T, P]
        assert (got.transpose(1, 2) - want[:, rows]).abs().max() < 1e-10 * want.abs().max()
        assert all(value.shape[:2] == (2, 4) for value in mixing.inputs)
        whole = mixing.rows(mixing.inputs, slice(3, 9))
    assert torch.equal(whole.triu(4), torch.zeros_like(whole))


@pytest.mark.parametrize("kind", MATRIX_MIXERS)
def test_the_matrix_depends_on_the_parts_that_are_named_and_on_all_of_them(kind: str) -> None:
    mixer = student(kind, "qwen3", attention=0.0).model.layers[1].self_attn
    mixing = mixer.mixing(torch.randn(2, 12, 32, dtype=torch.float64), Recurrence())
    mixing.rows(mixing.inputs, slice(None)).square().sum().backward()
    used = {name for name, weight in mixer.named_parameters() if weight.grad is not None}
    assert used == {name for name, _ in mixer.named_parameters() if name.startswith(mixer.matrix_parts)}


def test_mixers_without_a_matrix_are_refused() -> None:
    u = torch.randn(1, 5, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="use the hidden stage"):
        student("mamba1").model.layers[0].self_attn.mixing(u, Recurrence())
    with pytest.raises(ValueError, match="leave the stage out"):
        student("none").model.layers[0].self_attn.mixing(u, Recurrence())


# distances


def pair(layout: str = "plain") -> tuple[Mixing, Mixing]:
    """A mixer's matrix and attention's."""
    made, rec = student("mamba2", attention=0.0), recurrence(layout)
    source = teacher()
    source.set_attn_implementation(CAPTURED)
    heard = capture(source, {"input_ids": ids(2, T), **LAYOUTS[layout]}, scores=[1])
    return made.model.layers[1].self_attn.mixing(heard.streams[1], rec), heard.scores[1].mixing(rec)


@every_layout
@pytest.mark.parametrize("at_once", [1, 8 * T * 7, 2**24])
def test_the_distance_and_its_gradient_are_those_of_whole_matrices(monkeypatch, layout: str, at_once: int) -> None:
    monkeypatch.setattr(alignment, "_AT_ONCE", at_once)
    ours, theirs = pair(layout)
    whole = (ours.rows(ours.inputs, slice(None)) - theirs.rows(theirs.inputs, slice(None)).detach()).square().sum((2, 3))
    want = torch.autograd.grad(norm(whole).mean(1).sum(), ours.inputs, retain_graph=True)
    got = squared_distance(ours, theirs)
    assert torch.allclose(got, whole, rtol=1e-12)
    for one, other in zip(torch.autograd.grad(norm(got).mean(1).sum(), ours.inputs), want, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-13)


def test_the_distance_to_itself_is_nothing_with_a_gradient_of_nothing() -> None:
    _, theirs = pair()
    again = Mixing(tuple(value.clone().requires_grad_() for value in theirs.inputs), theirs.rows)
    distance = norm(squared_distance(again, theirs))
    assert distance.abs().max() < 1e-100
    assert all(bool((gradient == 0).all()) for gradient in torch.autograd.grad(distance.sum(), again.inputs))


def test_sampled_rows_estimate_the_squared_distance_without_bias(monkeypatch) -> None:
    """Over every choice of one row the estimate's mean is the exact value, and so it is for its gradient."""
    ours, theirs = pair("right")
    exact = squared_distance(ours, theirs)
    want = torch.autograd.grad(exact.sum(), ours.inputs, retain_graph=True)
    mean, gradients = torch.zeros_like(exact), [torch.zeros_like(value) for value in want]
    for row in range(T):
        monkeypatch.setattr(torch, "randperm", lambda length, device=None, row=row: (torch.arange(length) + row) % length)
        part = squared_distance(ours, theirs, sample=1)
        mean += part.detach() / T
        for gradient, more in zip(gradients, torch.autograd.grad(part.sum(), ours.inputs, retain_graph=True), strict=True):
            gradient += more / T
    assert torch.allclose(mean, exact, rtol=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-13) for a, b in zip(gradients, want, strict=True))
    monkeypatch.undo()
    estimates = torch.stack([squared_distance(ours, theirs, sample=10).detach() for _ in range(400)])
    assert ((estimates.mean(0) - exact).abs() < 4 * estimates.std(0) / 20 + 1e-9).all() and bool((estimates.std(0) > 0).all())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def test_no_whole_matrix_is_ever_made(monkeypatch) -> None:
    """B 1, H 4, T 512: blocks of 8 rows hold 16,384 elements, the matrix of one head 262,144, the input projection 51,200."""
    monkeypatch.setattr(alignment, "_AT_ONCE", 4 * 512 * 8)
    mixer, source = student("mamba2", attention=0.0).model.layers[0].self_attn, teacher()
    source.set_attn_implementation(CAPTURED)
    heard = capture(source, {"input_ids": ids(1, 512)}, scores=[0])
    ours, theirs = mixer.mixing(heard.streams[0], Recurrence()), heard.scores[0].mixing(Recurrence())
    with Largest() as largest:
        norm(squared_distance(ours, theirs)).sum().backward()
    assert 4 * 512 * 8 <= largest.elements <= 51_200


# one graph at a time


def test_gradients_taken_early_are_those_of_one_backward_pass() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]).double()
    x, alive = torch.randn(4, 6, dtype=torch.float64), []

    def value(first: int, count: int) -> Tensor:
        assert all(graph() is None for graph in alive), "the graph of an earlier part is still there"
        y = x
        for layer in layers[first : first + count]:
            y = torch.tanh(layer(y))
        alive.append(weakref.ref(y))
        return y.square().sum()

    def parts(count: int) -> list[Part]:
        return [Part(lambda i=i: value(i, count), list(layers[i : i + count].parameters())) for i in range(3)]

    for count in (1, 2):  # alone, and with weights that two parts share
        alive.clear()
        total, values = one_graph_at_a_time(parts(count))
        (2 * total).backward()
        got = [weight.grad.clone() for weight in layers.parameters()]
        layers.zero_grad()
        alive.clear()
        want = sum(value(i, count) for i in range(3) if not alive.clear())
        assert torch.allclose(total, want) and torch.allclose(torch.stack(values).sum(), want)
        for one, other in zip(got, torch.autograd.grad(2 * want, list(layers.parameters())), strict=True):
            assert torch.allclose(one, other, rtol=1e-12)
    with torch.no_grad():
        alive.clear()
        total, values = one_graph_at_a_time(parts(2))
    assert torch.allclose(total, want) and not total.requires_grad
