"""train="new": what the teacher does not have learns alone, and what is in sight stays the teacher's."""

from pathlib import Path

import pytest
import torch
from models import TEACHERS, ids, teacher
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamba.models.convert import convert
from llamba.models.hybrid import mixer_layers
from llamba.models.mixers import MIXERS
from llamba.running import run
from llamba.running.costs import cost
from llamba.running.counts import count
from llamba.settings import Data, Distill, Hidden, Recipe, Student
from llamba.stages import distill, hidden
from llamba.training.learnable import freeze

SIGHT = {"window": 4, "sinks": 1, "rotary": True}
SHORT = dict(batch=8, micro_batch=4, precision="fp32", lr=5e-3, warmup=0, log_every=1, save_every=10, clip=1.0, steps=3, train="new")


def taught(student) -> dict[str, tuple[int, int]]:
    """By a mixer's layer, which rows of in_proj hold V, K and Q, from the order that the mixer's documentation gives."""
    found = {}
    for index in mixer_layers(student.config):
        mixer = student.base_model.layers[index].self_attn
        c, sizes = mixer.config, mixer.rows()
        value, key, query = c.groups * c.head_dim, sizes.get("B", 0), sizes.get("C", 0)
        found[f"model.layers.{index}.self_attn.in_proj."] = c.heads * c.head_dim, c.heads * c.head_dim + value + key + query
    return found


@pytest.mark.parametrize("name", list(TEACHERS))
@pytest.mark.parametrize("mixer", [kind for kind in MIXERS if kind != "none"])
def test_gradients_of_what_is_new_are_what_they_were(mixer: str, name: str) -> None:
    options = SIGHT | {"rotary": mixer != "mamba3"} if MIXERS[mixer].reads_heads else {}  # that one turns by angles of its own
    made = convert(teacher(name), mixer=mixer, attention=0.5, options=options)
    wanted, given = {}, {}
    for train, found in (("mixers", wanted), ("new", given)):
        freeze(made, train)
        made.zero_grad()
        logits = made(ids(2, 20)).logits
        logits.square().mean().backward()
        found |= {"logits": logits.detach()} | {name: weight.grad for name, weight in made.named_parameters() if weight.requires_grad}
    assert torch.allclose(given["logits"], wanted["logits"], rtol=1e-12, atol=1e-13)
    rows = taught(made)
    for key, gradient in wanted.items():
        old = [(first, after) for place, (first, after) in rows.items() if key.startswith(place)]
        if any(part in key for part in ("out_proj", "q_norm", "k_norm")):
            assert key not in given, key
            continue
        for first, after in old:
            assert not given[key][first:after].any() and gradient[first:after].any(), key
            gradient[first:after] = 0
        assert torch.allclose(given[key], gradient, rtol=1e-9, atol=1e-14), key
    assert any("out_proj" in key for key in wanted) and given.keys() <= wanted.keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_what_is_in_sight_stays_the_teachers(tmp_path: Path, data, teacher_folder: Path, precision: str, calibrated: bool) -> None:
    """Fitted and trained, the first tokens' predictions are the teacher's own; those behind them are not, and come closer."""
    source = AutoModelForCausalLM.from_pretrained(teacher_folder)
    texts = ids(2, 40)
    student = convert(source, mixer="mamba2", attention=0.5, options=SIGHT, calibrate=ids(6, 64, seed=1) if calibrated else None)
    student.save_pretrained(tmp_path / "student")
    stage = Distill(**{**SHORT, "precision": precision}, kl=1.0, ce=0.0, targets="all")
    distill.run(stage, str(tmp_path / "student"), str(teacher_folder), data, tmp_path / "out")
    made, sight = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), SIGHT["window"] + SIGHT["sinks"]
    with torch.no_grad():
        want, found, start = (model(texts).logits for model in (source, made, student.eval()))
    assert (found - want)[:, :sight].abs().max() < 1e-4 * want.abs().max()
    assert (found - want)[:, sight:].abs().max() > 1e-2 * want.abs().max()
    assert not torch.allclose(found[:, sight:], start[:, sight:], atol=1e-4), "it learnt"


def test_rows_of_the_teacher_do_not_move(tmp_path: Path, data, student_folder: str, teacher_folder: Path) -> None:
    before = load_file(Path(student_folder) / "model.safetensors")
    rows = taught(AutoModelForCausalLM.from_pretrained(student_folder))
    for stage, train in ((Distill(**SHORT, kl=1.0, ce=0.0), distill.run), (Hidden(**SHORT), hidden.run)):
        train(stage, student_folder, str(teacher_folder), data, tmp_path / stage.name)
        after = load_file(tmp_path / stage.name / "model.safetensors")
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and all(".self_attn." in name and "out_proj" not in name for name in moved)
        for place, (first, last) in rows.items():
            name = f"{place}weight"
            assert torch.equal(before[name][first:last], after[name][first:last])
            assert not torch.equal(before[name][:first], after[name][:first]) and not torch.equal(before[name][last:], after[name][last:])


@pytest.mark.parametrize("name", ["llama-biased", "phi-qk-norm"])
def test_a_plan_counts_what_is_trained(name: str) -> None:
    source = teacher(name)
    student = convert(source, mixer="mamba2", attention=0.5, options=SIGHT)
    freeze(student, "new")
    trained = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
    assert cost(student.config, count(source.config, student.config), Distill(train="new"), 64).trained == trained


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"distill.train='new' .* needs distill.weight_decay=0, got 0.1"):
        Distill(train="new", weight_decay=0.1)
    for mixer, attention in (("attention", 0.5), ("mamba2", 1.0), ("none", 0.5)):
        with pytest.raises(ValueError, match="train='new' needs a student with mixers that are not attention and have weights"):
            freeze(convert(teacher(), mixer=mixer, attention=attention), "new")


@pytest.mark.parametrize("stage", [Distill(train="new"), Hidden(train="new")])
def test_attention_made_anew_is_refused_before_anything_is_made(stage, teacher_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    student, data = Student(mixer="attention", init="random"), Data(train=str(chat_file), length=64)
    with pytest.raises(ValueError, match=rf"{stage.name}.train='new' needs mixers that are not attention, got mixer='attention'"):
        run.run(Recipe(str(teacher_folder), student, data, [stage], str(tmp_path / "run")))
    assert not (tmp_path / "run" / "0-convert").exists()
