"""The recipe files: each through its own command line, two steps of every stage, with a small teacher of the same family."""

import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llamba.base.folders import finished
from llamba.running import run
from llamba.running.plan import plan
from llamba.settings import Data, Distill, Recipe, Stage, Student, Training
from llamba.settings.overrides import keys
from llamba.training.metrics import METRICS, read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # TRL asks by the old name
ROOT = Path(__file__).parent.parent
RECIPES = sorted({path.stem for path in (ROOT / "recipes").glob("*.py")} - {"align", "study"})  # test_trl.py and test_study.py have these
OURS = {"smollm2_50pct", "smollm2_0pct", "qwen3_50pct", "laptop"}  # no paper's
FAST = ("best_practice", "llama3_50pct")
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "zephyr": (MistralConfig, MistralForCausalLM), "phi": (PhiConfig, PhiForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM)}  # fmt: skip
LAYERS = {"llama3_stepwise": 32, "phi_mohawk_hybrid": 24}
TEXTS = ("c4", "fineweb", "pg19")
SHORT = {
    "steps": "2", "tokens": "none", "batch": "2", "micro_batch": "1", "warmup": "0", "precision": "fp32", "gradient_checkpointing": "false",
    "log_every": "1", "rows": "40", "max_prompt": "none", "max_new_tokens": "4", "unfinished": "keep", "head": "none",
}  # fmt: skip


def load(name: str) -> Recipe:
    recipe: Recipe = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))["recipe"]
    return recipe


@pytest.fixture(scope="session")
def teachers(tmp_path_factory, tokenizer):
    """Makes (once) a small random teacher of a family: a folder with weights and tokenizer."""

    def make(family: str, layers: int, width: int = 16) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"{family}-{layers}-{width}"
        if not folder.exists():
            torch.manual_seed(0)
            config, model = FAMILIES[family]
            shape = dict(hidden_size=width, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2)
            groups = 2 if family == "phi" else 1
            special = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
            made = config(vocab_size=len(tokenizer), num_key_value_heads=groups, max_position_embeddings=256, **shape, **special)
            model(made).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def local(tmp_path_factory, small) -> dict[str, Path]:
    """Local rows: chats, texts, pairs."""
    folder = tmp_path_factory.mktemp("local")
    chats = small.chats(40)
    texts = [{"text": " ".join(message["content"] for message in chat["messages"]) * 3} for chat in chats]
    pairs = [{"prompt": "a red cat", "chosen": "sings and sleeps", "rejected": "runs"} for _ in range(8)]
    rows = {"chats": chats, "texts": texts, "pairs": pairs}
    return {name: small.write_rows(folder / f"{name}.jsonl", lines) for name, lines in rows.items()}


def local_sources(data: Data, local: dict[str, Path], kind: str) -> str:
    """As many local files as the data has sources; what a stage of the run made stays."""
    names = [data.train] if isinstance(data.train, str) else data.train
    if any(name.startswith("stage:") for name in names):
        return ",".join(names)
    return ",".join(str(local["texts" if any(text in name for text in TEXTS) else kind]) for name in names)


def data_overrides(prefix: str, data: Data, local: dict[str, Path], kind: str) -> list[str]:
    return [f"{prefix}train={local_sources(data, local, kind)}", f"{prefix}length=64", f"{prefix}template=none"]


def arguments(recipe: Recipe, teacher: Path, other: Path, local: dict[str, Path], out: Path) -> list[str]:
    """The recipe's own keys, made small: two steps of every stage, local rows, the given teachers."""
    found = [f"teacher={teacher}", f"output={out}", *data_overrides("data.", recipe.data, local, "chats")]
    for number, stage in enumerate(recipe.stages):
        prefix = f"stages.{number}."
        if stage.data is not None:
            found += data_overrides(f"{prefix}data.", stage.data, local, "pairs" if stage.name == "dpo" else "chats")
        own = {field.name for field in fields(stage)}
        small = {key: value for key, value in SHORT.items() if key in own and not (stage.name == "matrix" and key == "rows")}
        found += [f"{prefix}{key}={small[key]}" for key in sorted(small, key=lambda key: key != "tokens")]
        found += [f"{prefix}teacher={other}"] if "teacher" in own and stage.teacher else []  # type: ignore[attr-defined]
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def check_conversion(before: Path, after: Path) -> None:
    """What was there is there, bit for bit; only the attention of newly converted layers is gone."""
    old, new = weights(before), weights(after)
    for name in old.keys() & new.keys():
        assert torch.equal(old[name], new[name]), name
    gone = {re.search(r"layers\.(\d+)\.self_attn", name) for name in old.keys() - new.keys()}
    assert None not in gone


def check_stage(stage: Stage, folder: Path) -> None:
    assert (folder / "DONE").exists()
    if isinstance(stage, Training):
        assert [line["step"] for line in read_metrics(folder / METRICS) if "loss" in line] == [1, 2], folder
    elif stage.name == "pseudo_label":
        assert list((folder / "rows").glob("*.jsonl"))


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES])
def test_two_steps_of_every_stage(name, tmp_path, monkeypatch, teachers, local, capsys):
    recipe = load(name)
    family = next((family for family in FAMILIES if name.startswith(family)), "llama")
    layers = LAYERS.get(name, 8)
    out = tmp_path / "run"
    given = arguments(recipe, teachers(family, layers), teachers(family, layers, width=32), local, out)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
    runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    previous = out / "0-convert"
    for number, stage in enumerate(recipe.stages, 1):
        if stage.skip:
            continue
        if stage.attention is not None:
            check_conversion(previous, out / f"{number}-convert")
            previous = out / f"{number}-convert"
        check_stage(stage, out / f"{number}-{stage.name}")
        previous = previous if isinstance(stage, run.SIDE_STAGES) else out / f"{number}-{stage.name}"
    assert f"done: {previous}" in capsys.readouterr().out and finished(out)[-1] == previous
    last = AutoModelForCausalLM.from_pretrained(previous)
    assert "linear_attention" in last.config.layer_types and last.config.num_hidden_layers == layers


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith("_draft")])
def test_a_recipe_says_where_it_comes_from(name):
    """Its source, the published scores and the cost; and it is a recipe whose every key can be named."""
    recipe = load(name)
    text = (ROOT / "recipes" / f"{name}.py").read_text()
    described = text.partition('"""')[2].partition('"""')[0]
    assert text.rstrip().endswith("launch(recipe)") and recipe.output == f"runs/{name}"
    if name in OURS:
        return
    assert re.search(r"arXiv \d{4}\.\d{5}", described) and "Source" in described
    assert re.search(r"[Ss]cores", described) and "Cost" in described and "student.mixer=" in described
    assert recipe.output == f"runs/{name}" and text.rstrip().endswith("launch(recipe)")
    assert f"stages.{len(recipe.stages) - 1}.skip" in keys(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_planned(name):
    assert re.search(r"\d hours|minutes? on", str(plan(load(name))))


def test_a_stage_can_be_left_out(tmp_path, teacher_folder, chat_file):
    """Its conversion is left out, too, and the numbers of the others stay."""
    short = dict(batch=4, micro_batch=4, steps=1, warmup=0, precision="fp32")
    stages = [Distill(**short), Distill(**short, attention=0.25, skip=True), Distill(**short)]
    recipe = Recipe(str(teacher_folder), Student(), Data(train=str(chat_file), length=48), stages, str(tmp_path))
    assert run.run(recipe).name == "3-distill"
    assert sorted(path.name for path in tmp_path.glob("?-*")) == ["0-convert", "1-distill", "3-distill"]
    assert "stage 2   distill: left out" in str(plan(recipe))
