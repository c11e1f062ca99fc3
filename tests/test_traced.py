"""Graphs that torch traces: torch.export, with fixed and with free lengths, and torch.compile without a break."""

from typing import Any

import pytest
import torch
from models import ids, student
from torch import Tensor, nn
from torch.export import Dim

slow = pytest.mark.slow
MIXERS = ["mamba1", "mamba2", *(pytest.param(name, marks=slow) for name in ("gated_delta", "kda", "toeplitz", "none"))]


class Logits(nn.Module):
    """What is exported: logits alone."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> Tensor:
        return self.model(ids, attention_mask=attention_mask, position_ids=position_ids, seq_idx=seq_idx, use_cache=False).logits


def forms(tokens: Tensor) -> dict[str, dict[str, Tensor]]:
    """Ways to say what is padded and where documents start."""
    B, T = tokens.shape
    padded = torch.ones_like(tokens)
    padded[0, :3] = 0
    return {
        "mask": {"attention_mask": torch.ones_like(tokens)},
        "padded": {"attention_mask": padded, "position_ids": (padded.cumsum(1) - 1).clamp_min(0)},
        "positions": {"position_ids": torch.arange(T).repeat(B, 1)},
        "packed": {"position_ids": torch.cat((torch.arange(5), torch.arange(T - 5))).repeat(B, 1)},
        "seq_idx": {"seq_idx": (torch.arange(T) >= 5).long().repeat(B, 1)},
    }


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")  # transformers' own, for its Llama too
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize("form", ["padded", *(pytest.param(name, marks=slow) for name in ("mask", "positions", "packed", "seq_idx"))])
def test_a_graph_of_one_length(form: str, strict: bool) -> None:
    model, tokens = student(dtype=torch.float32), ids(2, 12)
    graph = torch.export.export(Logits(model), (tokens,), forms(tokens)[form], strict=strict).module()
    assert torch.allclose(graph(tokens, **forms(tokens)[form]), Logits(model)(tokens, **forms(tokens)[form]), rtol=0, atol=1e-5)
    if form == "padded":  # what is traced with one mask obeys another
        other = {"attention_mask": forms(tokens)["padded"]["attention_mask"].flip(0), "position_ids": torch.arange(12).repeat(2, 1)}
        assert torch.allclose(graph(tokens, **other), Logits(model)(tokens, **other), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_one_graph_for_every_length(mixer: str) -> None:
    model, example = student(mixer), ids(2, 12)
    free, more = {0: Dim("B"), 1: Dim("T", min=3, max=4096)}, forms(example)["padded"]
    shapes = {"ids": free, **dict.fromkeys(more, free)}
    graph = torch.export.export(Logits(model), (example,), more, dynamic_shapes=shapes, strict=False).module()
    for tokens in (example, ids(3, 77), ids(1, 300), ids(2, 6)):
        for form in ("padded", "mask", "packed"):
            given = {**forms(tokens)["mask"], **forms(tokens)["positions"], **forms(tokens)[form]}
            assert (graph(tokens, **given) - Logits(model)(tokens, **given)).abs().max() < 1e-9, (tokens.shape, form)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"window": 16, "sinks": 2, "rotary": True}, pytest.param({"rotary": True}, marks=slow)])
def test_one_graph_with_window_sinks_and_rotation(options: dict[str, Any]) -> None:
    model, example = student(options=options), ids(2, 12)
    free, more = {0: Dim("B"), 1: Dim("T", min=3, max=4096)}, forms(example)["padded"]
    shapes = {"ids": free, **dict.fromkeys(more, free)}
    graph = torch.export.export(Logits(model), (example,), more, dynamic_shapes=shapes, strict=False).module()
    for tokens in (example, ids(3, 77), ids(1, 300)):
        given = forms(tokens)["padded"]
        assert (graph(tokens, **given) - Logits(model)(tokens, **given)).abs().max() < 1e-9, tokens.shape


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch itself, tracing functions with gradients
@pytest.mark.parametrize("mixer", ["mamba2", pytest.param("mamba1", marks=slow), pytest.param("gated_delta", marks=slow)])
@pytest.mark.parametrize("attention", [0.5, pytest.param(0.0, marks=slow)])
def test_a_forward_pass_compiles_without_a_break(mixer: str, attention: float) -> None:
    """With every argument, at several lengths, with the gradient; and with the cache that it returns by default."""
    model = student(mixer, attention=attention)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    for form in ("padded", "packed", "mask"):
        torch._dynamo.reset()  # what is compiled for each: three forms at three lengths are more than the limit of its cache
        for tokens in (ids(2, 12), ids(2, 77), ids(3, 130)):
            given = {**forms(tokens)[form], "use_cache": False}
            with torch.no_grad():
                assert (compiled(tokens, **given).logits - model(tokens, **given).logits).abs().max() < 1e-9
    torch._dynamo.reset()
    losses, gradients = [], []
    for one in (model, compiled):
        model.zero_grad()
        loss = one(ids(2, 40), labels=ids(2, 40), use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert abs(losses[0] - losses[1]) < 1e-10
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_a_compiled_pass_returns_the_cache_and_refuses_documents_with_it() -> None:
    torch._dynamo.reset()
    model, tokens = student(), ids(2, 12)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    got, want = compiled(tokens), model(tokens)
    assert torch.equal(got.logits, want.logits)
    more = ids(2, 3, seed=1)
    assert torch.allclose(model(more, past_key_values=got.past_key_values).logits, model(more, past_key_values=want.past_key_values).logits)
    with pytest.raises(RuntimeError, match="packed documents"):
        compiled(tokens, **forms(tokens)["packed"], use_cache=True)
