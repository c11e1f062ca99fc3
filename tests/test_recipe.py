"""Recipes: what they accept, what they refuse and in which words, overrides, JSON, and the command line."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from llamba.settings import Data, Distill, Recipe, Student
from llamba.settings.overrides import differences, from_dict, keys, override, to_dict
from llamba.settings.typed import read

ROOT = Path(__file__).parent.parent


def make(**changes) -> Recipe:
    parts = dict(teacher="org/model", student=Student(), data=Data(train="a.jsonl"), stages=[Distill()], output="runs/x")
    return Recipe(**{**parts, **changes})


def test_round_trip():
    data = Data(train=["a.jsonl", "b"], eval="c.jsonl")
    recipe = make(
        student=Student(attention=[1, 3], options={"window": 8, "rotary": True}),
        data=data,
        stages=[Distill(steps=3, data=Data(train="d.jsonl")), Distill(attention=0.25)],
    )
    assert from_dict(to_dict(recipe)) == recipe


@pytest.mark.parametrize(
    "make_part, words",
    [
        (lambda: Student(attention=1.5), "student.attention must be a fraction from 0 to 1 or a list of layers, got 1.5"),
        (lambda: Student(attention=[1, 1]), "different layer indices"),
        (lambda: Student(attention=[-1]), "different layer indices"),
        (lambda: Student(mixer=3), "student.mixer must be text, got 3"),
        (lambda: Student(options={"window": [1]}), "student.options must be names, each with true or false or a whole number"),
        (lambda: Data(train=[]), "data.train must be at least one source"),
        (lambda: Data(train="a", length=1), "data.length must be at least 2 tokens, got 1"),
        (lambda: Distill(lr=-1.0), "distill.lr must be a number > 0, got -1.0"),
        (lambda: Distill(lr=float("nan")), "distill.lr"),
        (lambda: Distill(lr=float("inf")), "distill.lr"),
        (lambda: Distill(kl=0.0, ce=0.0), "greater than 0"),
        (lambda: Distill(betas=(0.9, 1.0)), "distill.betas"),
        (lambda: Distill(batch=True), "distill.batch must be a whole number, got True"),
        (lambda: Distill(train="heads"), "distill.train must be 'mixers' or 'new' or 'all' or 'all_but_mlps', got 'heads'"),
        (lambda: Distill(steps=1, tokens=1), "give steps or tokens, not both"),
        (lambda: make(teacher=""), "recipe.teacher"),
        (lambda: make(stages=["distill"]), "recipe.stages must be a list of"),
    ],
)
def test_refuses(make_part, words):
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        make_part()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "assignment, get, value",
    [
        ("teacher=./my-llama", lambda r: r.teacher, "./my-llama"),
        ("student.attention=0.25", lambda r: r.student.attention, 0.25),
        ("student.attention=0", lambda r: r.student.attention, 0.0),
        ("student.attention=[1,3]", lambda r: r.student.attention, [1, 3]),
        ("student.attention=1,3", lambda r: r.student.attention, [1, 3]),
        ("student.attention=layers.json", lambda r: r.student.attention, "layers.json"),
        ("data.train=a.jsonl,b.jsonl", lambda r: r.data.train, ["a.jsonl", "b.jsonl"]),
        ("data.eval=none", lambda r: r.data.eval, None),
        ("stages.0.lr=1e-4", lambda r: r.stages[0].lr, 1e-4),
        ("stages.distill.lr=1e-4", lambda r: r.stages[0].lr, 1e-4),
        ("stages.0.betas=0.8,0.9", lambda r: r.stages[0].betas, (0.8, 0.9)),
        ("stages.0.gradient_checkpointing=true", lambda r: r.stages[0].gradient_checkpointing, True),
        ("stages.0.steps=7", lambda r: r.stages[0].steps, 7),
        ("stages.0.data.length=64", lambda r: r.stages[0].data.length, 64),
        ("stages.distill.data.train=b.jsonl", lambda r: r.stages[0].data.train, "b.jsonl"),
        ("stages.0.attention=0.25", lambda r: r.stages[0].attention, 0.25),
        ("student.options.window=64", lambda r: r.student.options, {"window": 64}),
        ("student.options.rotary=true", lambda r: r.student.options, {"rotary": True}),
        ("student.options.conv_activation=none", lambda r: r.student.options, {"conv_activation": None}),
        ("output=runs/a=b", lambda r: r.output, "runs/a=b"),
    ],
)
def test_override(assignment, get, value):
    changed = get(override(make(), [assignment], "r.py"))
    assert changed == value and type(changed) is type(value)


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("student.atention=0.5", "unknown key 'student.atention' in r.py; the nearest is 'student.attention', --help lists all"),
        ("stages.distil.lr=1", "unknown key 'stages.distil.lr' in r.py; the nearest is 'stages.distill.lr', --help lists all"),
        ("stages.1.lr=1", "unknown key 'stages.1.lr' in r.py; the nearest is 'stages.0.lr', --help lists all"),
        ("stages=3", "unknown key 'stages' in r.py"),
        ("stages.0.lr=fast", "stages.0.lr must be a number, got 'fast'"),
        ("stages.0.batch=2.5", "stages.0.batch must be a whole number, got '2.5'"),
        ("stages.0.gradient_checkpointing=1", "stages.0.gradient_checkpointing must be true or false, got '1'"),
        ("stages.0.train=heads", "stages.0.train must be 'mixers' or 'new' or 'all' or 'all_but_mlps', got 'heads'"),
        ("stages.0.betas=0.9", "stages.0.betas must be (a number, a number), got '0.9'"),
        ("stages.0.steps=none5", "stages.0.steps must be a whole number or none, got 'none5'"),
        ("stages.0.lr=-1", "distill.lr must be a number > 0, got -1.0"),
        ("faster", "needed key=value, got 'faster'"),
    ],
)
def test_override_refuses(assignment, message):
    with pytest.raises(ValueError) as caught:
        override(make(), [assignment], "r.py")
    assert str(caught.value).startswith(message)


def test_two_stages_of_one_name_need_an_index():
    recipe = make(stages=[Distill(), Distill()])
    assert "stages.distill.lr" not in keys(recipe) and "stages.1.lr" in keys(recipe)
    assert override(recipe, ["stages.1.lr=1"], "r.py").stages[1].lr == 1


def test_overrides_leave_the_recipe_alone():
    recipe = make()
    override(recipe, ["stages.0.lr=1"], "r.py")
    assert recipe == make()


def test_differences_name_leaves():
    old, new = to_dict(make()), to_dict(make(student=Student(attention=0.25), stages=[Distill(lr=1.0), Distill()]))
    found = differences(old, new)
    assert "student.attention: 0.5 -> 0.25" in found and "stages.0.lr: 8e-05 -> 1.0" in found
    assert any(line.startswith("stages.1: null -> ") for line in found) and len(found) == 3


def test_read_is_strict():
    assert read("none", int | None) is None and read("none", str) == "none"
    with pytest.raises(ValueError):
        read("nine", int | None)


def test_command_line_errors_are_one_line(recipe_file):
    path = recipe_file("")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(path), "stages.0.lrr=1"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: unknown key 'stages.0.lrr' in ") and "'stages.0.lr'" in line and "recipe.py" in line


def test_help_lists_the_keys(recipe_file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--help"])
    runpy.run_path(str(recipe_file("lr=0.5")), run_name="__main__")
    shown = capsys.readouterr().out
    assert "stages.distill.lr=0.5" in shown and "student.attention=0.5" in shown


def test_published_recipe_holds_the_papers_values():
    recipe = runpy.run_path(str(ROOT / "recipes" / "llama3_50pct.py"))["recipe"]
    labels, quarter, half, sft, dpo = recipe.stages
    assert recipe.student.attention == 0.75 and half.attention == 0.5 and labels.name == "pseudo_label"
    for stage, warmup in ((quarter, 188), (half, 63)):
        assert (stage.lr, stage.betas, stage.weight_decay, stage.clip, stage.batch, stage.warmup) == (
            8e-5,
            (0.9, 0.98),
            0.0,
            0.1,
            64,
            warmup,
        )
        assert (stage.ce, stage.kl, stage.train, recipe.data.length) == (1.0, 0.1, "mixers", 2048)
    assert (sft.lr, sft.batch, sft.data.length, sft.epochs, sft.train, sft.targets) == (2e-5, 64, 2048, 1.0, "all", "all")
    assert (dpo.lr, dpo.beta, dpo.batch, dpo.epochs, dpo.reference) == (5e-7, 0.01, 32, 1.0, "input")
