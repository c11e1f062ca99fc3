"""The delta rule: a few tokens behind others, fast decays, other people's forms of it; and its mixers in every form of running.

Shapes: B batch, T time, H query heads, G key/value heads, P head width, N state width.
"""

from typing import Any

import pytest
import torch
from models import DELTA_RULES, ids, rms_error, student
from torch import Tensor
from transformers import DynamicCache
from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from llamba.kernels.delta import delta_fold, delta_matrix, delta_resume, delta_rule
from llamba.models.mixers.delta import direction
from llamba.models.tree import grow

T = 14
every_decay = pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])


def inputs(channels: bool, B: int = 2, T: int = T, H: int = 4, G: int = 2, P: int = 5, N: int = 3) -> dict[str, Tensor]:
    """One rate in three is so fast that nothing passes."""
    made = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    shape = (B, T, H, *([N] if channels else []))
    a = -torch.rand(shape, generator=made, dtype=torch.float64) * torch.where(torch.rand(shape, generator=made) < 0.3, 300.0, 0.5)
    return {
        "x": randn(B, T, G, P), "a": a, "b": torch.nn.functional.normalize(randn(B, T, G, N), dim=-1), "c": randn(B, T, H, N),
        "erase": torch.rand(B, T, H, generator=made, dtype=torch.float64), "write": randn(B, T, H), "state": randn(B, H, P, N),
    }  # fmt: skip


def take(made: dict[str, Tensor], index: Any) -> dict[str, Tensor]:
    return {name: value if name == "state" else value[:, index] for name, value in made.items()}


def resume(made: dict[str, Tensor], new: dict[str, Tensor], u: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return delta_resume(new["x"], made["a"], made["b"], new["c"], new["erase"], write=new["write"], u=u, state=made["state"], **options)


@every_decay
def test_tokens_in_pieces_equal_the_whole_and_what_they_wrote_makes_the_state(channels: bool) -> None:
    """What stands behind the tokens, and in their own slots, is garbage."""
    made = inputs(channels)
    whole, last = delta_rule(**made, impl="sequential")
    u, done = torch.full((2, T, 4, 5), torch.nan, dtype=torch.float64), 0
    for count in (3, 1, 4, 6):
        dirty = made | {"a": made["a"].clone(), "b": made["b"].clone()}
        dirty["a"][:, done + count :], dirty["b"][:, done + count :] = 7, 9
        y, u[:, done : done + count] = resume(dirty, take(made, slice(done, done + count)), u, firsts=done)
        assert rms_error(y, whole[:, done : done + count]) < 1e-12
        done += count
    assert rms_error(delta_fold(u, made["a"], made["b"], state=made["state"]), last) < 1e-12
    mask = torch.arange(T)[None] < torch.tensor([[5], [9]])
    short = torch.cat([delta_rule(**take(made, slice(n)), impl="sequential")[1][row : row + 1] for row, n in enumerate((5, 9))])
    assert rms_error(delta_fold(u, made["a"], made["b"], mask=mask, state=made["state"]), short) < 1e-12
    firsts = torch.tensor([3, 7])
    places, rows = firsts[:, None] + torch.arange(4), torch.arange(2)[:, None]
    ragged = {name: value if name == "state" else value[rows, places] for name, value in made.items()}
    assert rms_error(resume(made, ragged, u, firsts=firsts)[0], whole[rows, places]) < 1e-12


@every_decay
def test_a_tree_equals_its_paths_also_in_two_calls(channels: bool) -> None:
    made, tree, root = inputs(channels), grow((2, 2), torch.device("cpu")), 5
    u = torch.zeros(2, T, 4, 5, dtype=torch.float64)
    u[:, :root] = resume(made, take(made, slice(root)), u, firsts=0)[1]
    nodes = slice(root, root + len(tree))
    y, new = resume(made, take(made, nodes), u, firsts=root, ancestors=tree.ancestors)
    for node in range(len(tree)):
        path = [*range(root + 1), *(root + step for step in tree.path(node))]
        assert rms_error(y[:, node], delta_rule(**take(made, path), impl="sequential")[0][:, -1]) < 1e-12, node
    u[:, root : root + 3] = new[:, :3]
    later = resume(made, take(made, slice(root + 3, root + len(tree))), u, firsts=root + 3, ancestors=tree.ancestors)
    assert rms_error(later[0], y[:, 3:]) < 1e-12 and rms_error(later[1], new[:, 3:]) < 1e-12


@every_decay
@pytest.mark.parametrize("rate", [-1e-4, -5.0, -200.0])
def test_decays_of_any_speed_keep_fp32_accuracy_and_finite_gradients(channels: bool, rate: float) -> None:
    made = {name: value.float() for name, value in inputs(channels, B=1, T=150, P=16, N=16).items()}
    made["a"] = (made["a"].sign() * -rate * torch.linspace(0.5, 1.5, made["a"].shape[-1])).float()
    leaves = {name: value.clone().requires_grad_() for name, value in made.items()}
    exact = {name: value.double().requires_grad_() for name, value in made.items()}
    got, want = delta_rule(**leaves, chunk=64), delta_rule(**exact, impl="sequential")
    assert rms_error(got[0], want[0]) < 2e-6
    pairs = [torch.autograd.grad(y.square().sum(), list(values.values())) for (y, _), values in ((got, leaves), (want, exact))]
    for name, one, other in zip(made, *pairs, strict=True):
        assert one.isfinite().all() and rms_error(one, other) < 1e-5 or other.abs().max() < 1e-30, name


@every_decay
def test_one_key_again_and_again_keeps_fp32_accuracy(channels: bool) -> None:
    """The system of a chunk is then as ill-conditioned as it gets: every entry below the diagonal is 1."""
    made = {name: value.float() for name, value in inputs(channels, B=1, T=128, N=8).items()}
    made["b"][:], made["erase"][:], made["a"][:] = made["b"][:, :1].clone(), 1.0, 0.0
    got, _ = delta_rule(**made, chunk=64)
    assert rms_error(got, delta_rule(**{name: value.double() for name, value in made.items()}, impl="sequential")[0]) < 1e-5


@every_decay
def test_with_one_gate_for_both_it_is_what_transformers_computes(channels: bool) -> None:
    """Oracles: Qwen3-Next's and Kimi Linear's own recurrences, in fp32; their states are [N, P], their queries divided by sqrt(N)."""
    made = {name: value.float() for name, value in inputs(channels, H=2).items()} | {"write": None}
    made["write"] = made["erase"]
    y, last = delta_rule(**made)
    theirs = recurrent_kimi_delta_attention if channels else torch_recurrent_gated_delta_rule
    want, state = theirs(
        made["c"] * 3**0.5, made["b"], made["x"], g=made["a"], beta=made["erase"], initial_state=made["state"].mT,
        output_final_state=True,
    )  # fmt: skip
    assert rms_error(y, want) < 1e-6 and rms_error(last, state.mT) < 1e-6


@pytest.mark.parametrize("case", ["plain", "documents", "mask"])
def test_the_matrix_times_x_is_the_output(case: str) -> None:
    made = inputs(False)
    del made["state"]
    options = {"documents": {"seq_idx": torch.arange(T)[None].expand(2, T) // 5}, "mask": {"mask": torch.arange(2 * T).view(2, T) % 3 > 0}}
    chosen: dict[str, Any] = options.get(case, {})
    x = made.pop("x")
    M = delta_matrix(**made, **chosen)
    want, _ = delta_rule(x, **made, impl="sequential", **chosen)
    assert rms_error(torch.einsum("bhij,bjhp->bihp", M, x.repeat_interleave(2, 2)), want) < 1e-12
    assert torch.equal(delta_matrix(**made, **chosen, rows=slice(3, 9)), M[:, :, 3:9])


def test_wrong_arguments_are_named() -> None:
    made = inputs(True)
    with pytest.raises(ValueError, match=r"a must have shape \[2, 14, 4, 3\], got \[2, 14, 4, 2\]"):
        delta_rule(**(made | {"a": made["a"][..., :2]}))
    with pytest.raises(ValueError, match=r"erase must have shape \[2, 14, 4\], got \[2, 14, 3\]"):
        delta_rule(**(made | {"erase": made["erase"][..., :3]}))
    with pytest.raises(ValueError, match="ancestors must have a row for each of the 14 tokens, got 7"):
        resume(made, made, torch.zeros(2, T, 4, 5), firsts=0, ancestors=grow((2, 2), torch.device("cpu")).ancestors)
    with pytest.raises(ValueError, match=r"a must have 3 dimensions \[B, T, H\]"):
        delta_matrix(made["a"], made["b"], made["c"], made["erase"])


def test_a_key_is_its_direction_times_its_length_also_where_it_is_none() -> None:
    keys = torch.randn(3, 5, dtype=torch.float64)
    keys[1] = 0
    keys.requires_grad_()
    b, length = direction(keys)
    assert rms_error(b * length, keys) < 1e-15 and (b[[0, 2]].norm(dim=-1) - 1).abs().max() < 1e-12
    b.sum().backward()
    assert keys.grad is not None and keys.grad.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("mixer", DELTA_RULES)
def test_whole_chunked_stepwise_padded_packed_and_taken_back_agree(mixer: str) -> None:
    model, tokens = student(mixer, "qwen3", attention=0.0), ids(2, 45)
    whole = model(tokens, use_cache=False).logits
    first = model(tokens[:, :33])
    rest = [model(tokens[:, t : t + 1], past_key_values=first.past_key_values).logits for t in range(33, 45)]
    assert rms_error(torch.cat((first.logits, *rest), 1), whole) < 1e-10
    padded = torch.cat((torch.zeros(2, 5, dtype=torch.long), tokens), 1)
    mask = (torch.arange(50) >= 5).expand(2, 50)
    assert rms_error(model(padded, attention_mask=mask.long(), use_cache=False).logits[:, 5:], whole) < 1e-10
    positions = torch.cat((torch.arange(20), torch.arange(25)))[None].expand(2, -1)
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    assert rms_error(packed[:, 20:], model(tokens[:, 20:], use_cache=False).logits) < 1e-10
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(tokens[:, :20], past_key_values=cache)
    model(ids(2, 7, seed=1), past_key_values=cache)
    cache.crop(-7)
    again = model(tokens[:, 20:], past_key_values=cache).logits
    assert rms_error(again, whole[:, 20:]) < 1e-10


@pytest.mark.parametrize("mixer", DELTA_RULES)
def test_every_weight_of_a_fresh_student_learns(mixer: str) -> None:
    model = student(mixer, attention=0.0, init="attention").train()
    model(ids(2, 20)).logits.square().mean().backward()
    mixers = [layer.self_attn for layer in model.model.layers]
    untouched = {name for one in mixers for name, weight in one.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert untouched <= ({"dt_proj.weight"} if mixer == "kda" else set())  # its input starts at 0


def test_states_are_whole_heads_and_nothing_published_needs_another_convolution() -> None:
    with pytest.raises(ValueError, match=r"gated_delta needs state = head_dim .*; got 4 and 8"):
        student("gated_delta", options={"state": 4})
    with pytest.raises(ValueError, match="kda needs mixer.conv_after_repeat=false"):
        student("kda", options={"conv_after_repeat": True})
