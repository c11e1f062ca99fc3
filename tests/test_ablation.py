"""The ablations' mixers: their matrices, and everything that a hybrid model can do with them."""

import pytest
import torch
from models import TEACHERS, ids, rms_error, student, teacher
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from llamba.models.convert import convert
from llamba.models.hybrid import mixer_layers
from llamba.models.mixers import MixerConfig, Recurrence, build_mixer, initialise
from llamba.running.plan import plan
from llamba.settings import Data, Distill, Recipe, Student

KINDS = ("none", "toeplitz", "low_rank")
kinds = pytest.mark.parametrize("kind", KINDS)


def logits(model: PreTrainedModel, tokens: Tensor, **more) -> Tensor:
    with torch.no_grad():
        return model(tokens, **{"use_cache": False, **more}).logits


def mixer(kind: str, groups: int = 2):
    config = MixerConfig(kind=kind, hidden_size=32, heads=4, groups=groups, head_dim=8, state=8, conv_activation=None)
    made = build_mixer(vars(config), 0).double()
    initialise(made, None, "random", torch.Generator().manual_seed(0))
    return made


def test_toeplitz_is_a_causal_convolution_with_a_kernel_made_of_the_tokens() -> None:
    """Oracle: the definition, token by token, from the module's own weights."""
    made, u = mixer("toeplitz"), torch.randn(2, 19, 32, dtype=torch.float64)
    z, x, kernel = made.in_proj(u).split([32, 16, 4], -1)
    x = nn.functional.conv1d(nn.functional.pad(x.mT, (3, 0)), made.conv1d.weight, made.conv1d.bias, groups=16).mT
    x = x.unflatten(-1, (2, 8)).repeat_interleave(2, 2)  # [B, T, H, P]
    y = made.D[:, None] * x
    for i in range(19):
        for j in range(i + 1):
            y[:, i] = y[:, i] + kernel[:, i - j, :, None] * x[:, j]
    want = made.out_proj(y.flatten(-2) * nn.functional.silu(z))
    assert rms_error(made(u)[0], want) < 1e-12


def test_low_rank_is_linear_attention_and_a_skip() -> None:
    made, u = mixer("low_rank"), torch.randn(2, 70, 32, dtype=torch.float64)
    parts = made._project(u)
    x, b, c = made.heads_of(made._convolve(parts, Recurrence(), None)[0], parts)
    x, b = x.repeat_interleave(2, 2), b.repeat_interleave(2, 2)
    y = torch.einsum("bhij,bjhp->bihp", torch.einsum("bihn,bjhn->bhij", c, b).tril(), x) + made.D[:, None] * x
    want = made.out_proj(y.flatten(-2) * nn.functional.silu(parts["z"]))
    assert rms_error(made(u)[0], want) < 1e-12
    assert {name for name, _ in made.named_parameters()} == {
        "D", "in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "out_proj.weight"
    }  # fmt: skip


def test_none_leaves_the_mlp_alone() -> None:
    source = teacher()
    made, tokens = convert(source, mixer="none", attention=0.5), ids(1, 12)
    with torch.no_grad():
        for index in (0, 2):
            source.model.layers[index].self_attn.o_proj.weight.zero_()
    assert rms_error(logits(made, tokens), logits(source, tokens)) < 1e-12
    assert not list(made.model.layers[0].self_attn.parameters())
    made(tokens, use_cache=False).logits.sum().backward()
    assert all(weight.grad is not None for weight in made.parameters())


@kinds
@pytest.mark.parametrize("name", ["llama", "mistral", "phi", "qwen3"])
def test_chunks_and_single_steps_equal_the_whole(kind: str, name: str) -> None:
    model, tokens = student(kind, name), ids(2, 40)
    cache, steps = None, []
    with torch.no_grad():
        for piece in (*tokens[:, :3].split(1, 1), tokens[:, 3:30], *tokens[:, 30:].split(1, 1)):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert rms_error(torch.cat(steps, 1), logits(model, tokens)) < 1e-10


@kinds
@pytest.mark.parametrize("mask", [[[0] * 5 + [1] * 9, [1] * 14], [[1] * 9 + [0] * 5, [1] * 14], [[1, 0, 0, 1, 1] * 2 + [1] * 4, [1] * 14]])
def test_padding_is_absent(kind: str, mask: list) -> None:
    model, tokens, real = student(kind, attention=0.0), ids(2, 14), torch.tensor(mask)
    with torch.no_grad():
        first = model(tokens, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp_min(0))
        both = torch.cat((real, torch.ones(2, 3, dtype=torch.long)), 1)
        second = model(ids(2, 3, seed=1), attention_mask=both, past_key_values=first.past_key_values).logits
    for row in range(2):
        alone = torch.cat((tokens[row][real[row].bool()], ids(2, 3, seed=1)[row]))[None]
        got = torch.cat((first.logits[row][real[row].bool()], second[row]))
        assert rms_error(got, logits(model, alone)[0]) < 1e-10


@kinds
def test_documents_are_apart(kind: str) -> None:
    model, documents = student(kind), [ids(1, length, seed=length) for length in (2, 35, 1, 20)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    got = logits(model, torch.cat(documents, 1), position_ids=positions)
    assert rms_error(got, torch.cat([logits(model, document) for document in documents], 1)) < 1e-10


@kinds
@pytest.mark.parametrize("attention", [0.0, 0.5])
def test_generation_and_rollback(kind: str, attention: float) -> None:
    model, tokens = student(kind, attention=attention), ids(2, 11)
    more = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens), "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(tokens, **more), model.generate(tokens, use_cache=False, **more))
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids(2, 45), past_key_values=cache)
        for count in (1, 5, 3):
            model(ids(2, count, seed=count), past_key_values=cache)
            cache.crop(-count)
        got = model(tokens, past_key_values=cache).logits
    assert rms_error(got, logits(model, torch.cat((ids(2, 45), tokens), 1))[:, -11:]) < 1e-10


@pytest.mark.parametrize("name", TEACHERS)
def test_attention_as_the_mixer_is_the_teacher_or_starts_anew(name: str, tmp_path) -> None:
    source, tokens = teacher(name, dtype=torch.float32), ids(1, 30)
    copied = convert(source, mixer="attention", attention=0.5)
    assert torch.equal(logits(copied, tokens), logits(source, tokens))
    assert mixer_layers(copied.config) == [0, 2] and copied.conversion.kept == [1, 3] and mixer_layers(source.config) == []
    anew = convert(source, mixer="attention", attention=0.5, init="random")
    before, after = source.state_dict(), anew.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("model.layers.0.self_attn", "model.layers.2.self_attn"))}
    assert all(0.01 < after[f"model.layers.{i}.self_attn.q_proj.weight"].std() < 0.03 for i in (0, 2))
    further = convert(anew, mixer="attention", attention=0.25, init="random", seed=1)
    assert mixer_layers(further.config) == [0, 1, 2]
    assert torch.equal(further.model.layers[0].self_attn.q_proj.weight, anew.model.layers[0].self_attn.q_proj.weight)
    further.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert mixer_layers(again.config) == [0, 1, 2] and torch.equal(logits(again, tokens), logits(further, tokens))
    with pytest.raises(ValueError, match="must be one of attention, mohawk, random"):
        convert(source, mixer="attention", init="paper")


@pytest.mark.parametrize("kind", [*KINDS, "attention"])
def test_ablations_can_be_planned(kind: str) -> None:
    recipe = Recipe("microsoft/phi-1_5", Student(mixer=kind, init="random"), Data(train="x.jsonl"), [Distill()], "runs/x")
    made = plan(recipe)
    attention = 4 * 2048 * 2048 + 4 * 2048
    assert made.kept == list(range(1, 24, 2)) and f"{kind}, init random" in str(made)
    lost = {"none": -attention, "attention": 0}.get(kind)
    assert lost is None or made.counts.mixers == 12 * (attention + lost)


@kinds
@pytest.mark.parametrize("name", TEACHERS)
def test_saved_folders_load(kind: str, name: str, tmp_path) -> None:
    model = student(kind, name, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids(1, 9)), logits(model, ids(1, 9)))
