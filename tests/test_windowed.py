"""Mixers that keep what attention knew: with a window as long as the text they are the teacher, and every way through them agrees."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TEACHERS, ids, rms_error, student, teacher
from safetensors.torch import load_file, save_file
from test_mixers import exact_norm, linear_attention
from torch import Tensor
from transformers import PreTrainedModel

from llamba.eval.lengths import cache_bytes
from llamba.kernels.window import View, window_view
from llamba.models.convert import convert
from llamba.models.families import family_of
from llamba.models.loading import load_model

QKV = ("mamba2", "discrete_mamba2")
WHOLE: dict[str, Any] = {"window": 512}


def exact(source: PreTrainedModel) -> PreTrainedModel:
    """The teacher with norms of queries and keys that do not round to fp32."""
    for layer in source.model.layers:
        for name, norm in list(layer.self_attn.named_children()):
            if name.startswith(("q_norm", "k_norm")):
                norm.forward = lambda heads, norm=norm: exact_norm(norm, heads)
    return source


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor, **more: Any) -> Tensor:
    return model(tokens, use_cache=False, **more).logits


@pytest.mark.parametrize("groups", [4, 2], ids=["H=G", "H>G"])
@pytest.mark.parametrize("mixer", QKV)
@pytest.mark.parametrize("name", TEACHERS)
def test_with_a_window_as_long_as_the_text_a_student_is_its_teacher(name: str, mixer: str, groups: int) -> None:
    source = exact(teacher(name, groups))
    made = convert(source, mixer=mixer, attention=0.0, options={**WHOLE, "rotary": mixer == "mamba2", "sinks": groups})
    tokens = ids(2, 40)
    want = logits(source, tokens)
    assert (logits(made, tokens) - want).abs().max() <= 1e-9 * want.abs().max()
    mask = torch.ones_like(tokens)
    mask[1, :11] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = {"attention_mask": mask, "position_ids": positions}
    assert rms_error(logits(made, tokens, **padded)[mask > 0], logits(source, tokens, **padded)[mask > 0]) < 1e-9
    packed = {"position_ids": torch.cat((torch.arange(25), torch.arange(15)))[None].expand(2, -1)}
    assert rms_error(logits(made, tokens, **packed), logits(source, tokens, **packed)) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("name", TEACHERS)
def test_where_nothing_is_out_of_sight_a_trained_join_leaves_attention_as_it_is(name: str) -> None:
    """Window 6 and 2 sinks: the first eight tokens of every document, wherever it stands and however it is read, are the teacher's."""
    source, tokens = exact(teacher(name)), ids(2, 22)
    made = convert(source, mixer="mamba2", attention=0.0, options={"window": 6, "sinks": 2, "rotary": True})
    for layer in made.model.layers:
        for weight in (layer.self_attn.gain[1], layer.self_attn.rest_bias, layer.self_attn.rest_growth, layer.self_attn.rest_mean):
            weight.normal_()
        layer.self_attn.in_proj.weight[-made.config.num_attention_heads :].normal_()
    mask = torch.ones_like(tokens)
    mask[1, [0, 1, 2, 5, 9]] = 0
    place = (mask.cumsum(1) - 1).clamp_min(0)
    padded = {"attention_mask": mask, "position_ids": place}
    packed = {"position_ids": torch.cat((torch.arange(13), torch.arange(9)))[None].expand(2, -1)}
    for more, first, real in (
        ({}, torch.arange(22).expand(2, -1) < 8, mask >= 0), (padded, place < 8, mask > 0), (packed, packed["position_ids"] < 8, mask >= 0),
    ):  # fmt: skip
        got, want = logits(made, tokens, **more), logits(source, tokens, **more)
        assert rms_error(got[first & real], want[first & real]) < 1e-9
        assert rms_error(got[~first & real], want[~first & real]) > 1e-3
    whole, out = logits(made, tokens), made(tokens[:, :3], use_cache=True)
    read = [out.logits]
    for token in tokens[:, 3:].split(1, 1):
        read.append(made(token, past_key_values=out.past_key_values).logits)
    assert rms_error(torch.cat(read, 1), whole) < 1e-9


@torch.no_grad()
def test_the_rest_is_one_more_entry_of_the_softmax_whatever_is_seen() -> None:
    """Written out: the scores of what is seen and of the rest under one softmax, whose values are theirs."""
    made = convert(teacher(), mixer="mamba2", attention=0.0, options={"window": 6, "sinks": 2, "rotary": True})
    one, T = made.model.layers[0].self_attn.train(), 12
    c = one.config
    for weight in (one.rest_bias, one.rest_growth, one.rest_mean):
        weight.normal_()
    q, k, v = (torch.randn(2, T, n, c.head_dim, dtype=torch.float64) for n in (c.heads, c.groups, c.groups))
    recurrent, rows = torch.randn(2, T, c.inner, dtype=torch.float64), torch.randn(2, T, c.heads, dtype=torch.float64)
    view = window_view(q, k, v, one.sight, scale=1.0)
    got = one._joined(recurrent, view, rows).unflatten(-1, (c.heads, -1))
    for t in range(T):
        seen, far = [s for s in range(t + 1) if t - s < 6 or s < 2], list(range(2, t - 5))
        for head in range(c.heads):
            group = head // (c.heads // c.groups)
            scores = (q[:, t, head, None] * k[:, seen, group]).sum(-1)  # [B, S]
            values = v[:, seen, group]
            if far:
                score = rows[:, t, head] + one.rest_bias[head] + one.rest_growth[head] * math.log(len(far))
                mean = v[:, far, group].mean(1) * one.rest_mean.view(c.heads, -1)[head]
                scores = torch.cat((scores, score[:, None]), 1)
                values = torch.cat((values, (recurrent.view(2, T, c.heads, -1)[:, t, head] + mean)[:, None]), 1)
            want = (scores.softmax(-1)[..., None] * values).sum(1)
            assert torch.allclose(got[:, t, head], want, rtol=1e-9, atol=1e-12)
    one.drop_window = 1.0
    assert torch.equal(one._joined(recurrent, view, rows), one.rest_value(recurrent, view.mean)), "rows without a window: the rest alone"


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["mamba2-window", "gated_delta-window", "discrete_mamba2-window"])
def test_in_the_students_of_these_tests_both_sides_of_the_softmax_count(mixer: str) -> None:
    made, masses = student(mixer, attention=0.0), []
    for layer in made.model.layers:
        one = layer.self_attn

        def watched(recurrent: Tensor, view: View, rows: Tensor, one: Any = one) -> Tensor:
            masses.append(torch.sigmoid(one.rest_score(rows, view.more) - view.lse)[view.far.expand(len(rows), -1)])
            return type(one)._joined(one, recurrent, view, rows)

        one._joined = watched
    made(ids(2, 40), use_cache=False)
    mass = torch.cat(masses)
    assert ((mass > 0.05) & (mass < 0.95)).double().mean() > 0.4, mass.mean()


def test_bytes_of_a_cache_count_the_keys_and_values_in_sight() -> None:
    source = teacher("llama-3.2")

    def measured(**options: Any) -> int:
        made = convert(source, mixer="mamba2", attention=0.0, options=options)
        return cache_bytes(made(ids(1, 20), use_cache=True).past_key_values)

    c = source.config
    slot = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * source.dtype.itemsize
    assert measured(window=6, sinks=3) - measured() == 9 * slot + slot // 2, "and the sum of the values out of sight"


def test_a_folder_of_before_the_rest_is_one_line(tmp_path: Path) -> None:
    convert(teacher(), mixer="mamba2", attention=0.5, options={"window": 6}).save_pretrained(tmp_path)
    weights = {name: value for name, value in load_file(tmp_path / "model.safetensors").items() if ".rest_" not in name}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="a student with a window needs .*rest_bias.*got one of an earlier llamba: convert it anew"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["llama-3.2", "mistral", "phi", "qwen3"])
def test_greedy_tokens_of_such_a_student_are_its_teachers(name: str) -> None:
    source = exact(teacher(name))
    made, tokens = convert(source, attention=0.5, options=WHOLE), ids(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    more = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": mask}
    assert torch.equal(made.generate(tokens, **more), source.generate(tokens, **more))


@pytest.mark.parametrize("mixer", QKV)
@pytest.mark.parametrize("name", TEACHERS)
def test_without_decay_a_turned_mixer_is_the_teachers_turned_linear_attention(name: str, mixer: str) -> None:
    source = exact(teacher(name))
    options = {"conv_activation": None, "out_norm": False, "rotary": True}
    made = convert(source, mixer=mixer, attention=0.0, init="linear_attention", options=options)
    u, positions = torch.randn(2, 70, 32, dtype=torch.float64), torch.arange(70)[None]
    angles = source.model.rotary_emb(u, position_ids=positions)
    shape = family_of(source.config).shape(source.config)
    for before, after in zip(source.model.layers, made.model.layers, strict=True):
        want = linear_attention(before.self_attn, u, shape["heads"], shape["groups"], angles)
        got = after.self_attn(hidden_states=u, position_embeddings=angles)[0]
        assert (got - want).abs().max() <= 1e-9 * want.abs().max()
