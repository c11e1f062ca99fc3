"""What AGENTS.md promises: a family or a mixer is a file and one line, a stage a settings class, a file and a line in two tables."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import ArceeConfig, ArceeForCausalLM, ArceeModel, ArceePreTrainedModel, AutoModelForCausalLM, AutoTokenizer

from llamba.cli import main
from llamba.models import families
from llamba.models.convert import convert
from llamba.models.families.base import Family, attention_biases
from llamba.models.hybrid import HybridBackbone, HybridCausalLM, HybridSequenceClassifier
from llamba.models.mixers import MIXERS
from llamba.models.mixers.mamba2 import Mamba2
from llamba.running import run
from llamba.settings import STAGE_CONFIGS, Data, Recipe, Stage, Student
from llamba.settings.overrides import from_dict, override, to_dict
from llamba.stages import STAGES


class Forgetful(Mamba2):
    """Mamba-2 that forgets twice as fast: all that a new mixer's file would hold."""

    @classmethod
    def defaults(cls, shape):
        return super().defaults(shape) | {"conv_width": 3}

    def factors(self, dt):
        decay, write = super().factors(dt)
        return 2 * decay, write


@torch.no_grad()
def test_a_mixer_is_one_line_more(teacher_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(MIXERS, "forgetful", Forgetful)  # the line
    main(["convert", str(teacher_folder), str(tmp_path / "student"), "--mixer", "forgetful"])
    assert "q_proj.weight" in capsys.readouterr().out
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    mixer = student.model.layers[0].self_attn
    assert isinstance(mixer, Forgetful) and mixer.conv1d.weight.shape[-1] == 3
    ids = torch.tensor([[5, 9, 7, 11, 6, 30, 12]])
    whole = student(ids).logits
    cache = student(ids[:, :4], use_cache=True).past_key_values
    stepped = [student(ids[:, place : place + 1], past_key_values=cache).logits for place in range(4, 7)]
    torch.testing.assert_close(torch.cat(stepped, 1), whole[:, 4:], rtol=1e-4, atol=1e-5)
    assert student.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > 7


class ArceeHybridConfig(ArceeConfig):
    """Arcee: Llama with a squared ReLU. These classes and FAMILY are all that a new family's file would hold."""

    model_type = "llamba_arcee"
    layer_types: list[str] | None = None
    mixer: dict[str, Any] = field(default_factory=dict)
    head_tokens: int | None = None
    auto_map: dict[str, str] | None = field(default_factory=dict)


class ArceeHybridModel(HybridBackbone, ArceeModel):
    config: ArceeHybridConfig


class ArceeHybridForCausalLM(HybridCausalLM, ArceeForCausalLM):
    config: ArceeHybridConfig
    backbone = ArceeHybridModel


class ArceeHybridForSequenceClassification(HybridSequenceClassifier, ArceePreTrainedModel):
    config: ArceeHybridConfig


FAMILY = Family(ArceeHybridConfig, ArceeHybridModel, ArceeHybridForCausalLM, ArceeHybridForSequenceClassification, attention_biases)


@torch.no_grad()
def test_a_family_is_one_line_more(tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as alone:  # the Auto classes learn it once, as they do on import
        alone.setattr(families, "FAMILIES", {"arcee": FAMILY})
        families.register()
    monkeypatch.setitem(families.FAMILIES, "arcee", FAMILY)  # the line
    torch.manual_seed(0)
    shape = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    teacher = ArceeForCausalLM(ArceeConfig(**shape, num_key_value_heads=2, pad_token_id=None, eos_token_id=2)).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    main(["convert", str(tmp_path / "teacher"), str(tmp_path / "student"), "--attention", "0.5"])
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    kept, mixed = student.model.layers[1].self_attn, student.model.layers[0].self_attn
    assert torch.equal(kept.q_proj.weight, teacher.model.layers[1].self_attn.q_proj.weight) and isinstance(mixed, MIXERS["mamba2"])
    ids = torch.tensor([[5, 9, 7, 11, 6, 30, 12]])
    assert student.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 11)
    whole = convert(teacher, mixer="mamba2", attention=1.0)
    torch.testing.assert_close(whole(ids).logits, teacher(ids).logits)


@dataclass(frozen=True)
class Count(Stage):
    """Counts the weights of the student: all that a new stage's settings would hold."""

    name: ClassVar[str] = "count"

    times: int = 1


def count(stage: Count, student: str, teacher: str, data, out: Path) -> dict[str, float]:
    """All that a new stage's file would hold."""
    model = AutoModelForCausalLM.from_pretrained(student)
    model.save_pretrained(out)
    return {"weights": stage.times * sum(weight.numel() for weight in model.parameters())}


def test_a_stage_is_one_line_in_each_of_two_tables(teacher_folder: Path, chat_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(STAGE_CONFIGS, "count", Count)  # the lines
    monkeypatch.setitem(STAGES, "count", count)
    recipe = Recipe(str(teacher_folder), Student(), Data(train=str(chat_file), length=48), [Count()], str(tmp_path / "run"))
    recipe = override(recipe, ["stages.count.times=2"], "recipe.py")
    assert from_dict(to_dict(recipe)) == recipe
    with pytest.raises(ValueError, match="stages.count.times"):
        override(recipe, ["stages.count.times=two"], "recipe.py")
    last = run.run(recipe)
    report = json.loads((last / "stage.json").read_text())
    assert last.name == "1-count" and report["results"]["weights"] > 0 and report["config"]["times"] == 2
    assert AutoTokenizer.from_pretrained(last).chat_template
