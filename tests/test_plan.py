"""Plans: exact parameter counts against the published ones, no network, no weights."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llamba.models.convert import convert
from llamba.models.published import KNOWN, teacher_config
from llamba.running.costs import adapted
from llamba.running.machine import Machine, measured
from llamba.running.plan import REACHED, plan, plan_here
from llamba.settings import Data, Distill, Dpo, Hidden, Lora, Recipe, Sft, Stage, Student
from llamba.training import lora

ROOT = Path(__file__).parent.parent
# Parameters of the published models, from their weight files.
PUBLISHED = {
    "meta-llama-3-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096, "phi-1_5": 1_418_270_720, "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}  # fmt: skip


def recipe(teacher: str = "meta-llama/Meta-Llama-3-8B-Instruct", stage: Stage | None = None, **student) -> Recipe:
    made = Student(**{"mixer": "mamba2", **student})
    return Recipe(teacher=teacher, student=made, data=Data(train="x.jsonl"), stages=[stage or Distill()], output="runs/x")


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_shapes_have_the_published_number_of_parameters(name: str) -> None:
    assert plan(recipe(name, attention=1.0)).counts.teacher == PUBLISHED[name]


def test_llama3_8b_counts() -> None:
    made = plan(recipe())
    c = made.counts
    assert made.kept == list(range(1, 32, 2))
    assert sum(c.published.values()) - c.attention == 16_943_200
    assert c.published["in_proj[z]"] == 4096 * 4096 and c.published["in_proj[dt]"] == 32 * 4096
    assert c.own == {"in_proj.bias": 10_272}
    assert c.mixers == 16 * (sum(c.published.values()) + 10_272) and round(c.mixers / 1e6) == 942
    text = str(made)
    for words in ("+16.943 M", "942.", "1, 3, 5", "GiB", "hours", "in_proj.bias"):
        assert words in text, words


def test_every_published_layout_adds_up() -> None:
    """Mamba-1: 60.91 M per layer (18.97 M more than attention); Phi-Mamba: 21.1 M per layer."""
    mamba1 = plan(recipe(mixer="mamba1")).counts
    assert (
        abs(sum(mamba1.published.values()) - 60.91e6) < 0.02e6 and abs(sum(mamba1.published.values()) - mamba1.attention - 18.97e6) < 0.02e6
    )
    phi = plan(recipe("microsoft/phi-1_5", mixer="discrete_mamba2")).counts
    assert abs(sum(phi.published.values()) - 21.1e6) < 0.05e6
    assert set(phi.own) == {"in_proj.bias", "out_proj.bias", "dt_bias"}
    for counts in (mamba1, phi):
        assert counts.mixers % (sum(counts.published.values()) + sum(counts.own.values())) == 0


def test_a_fraction_that_does_not_divide_is_told() -> None:
    made = plan(recipe("meta-llama/Llama-3.2-3B-Instruct", attention=0.125))
    assert made.kept == [7, 15, 23] and "3 of 28 layers = 0.1071 (asked: 0.125): 7, 15, 23" in str(made)


def test_budgets() -> None:
    assert "262,144,000 tokens = 2,000 steps of 64 x 2,048" in str(plan(recipe(stage=Distill(tokens=262_144_000))))
    assert "3 steps of 64 x 2,048 = at most 393,216 tokens" in str(plan(recipe(stage=Distill(steps=3))))
    assert "per 1,000,000,000 tokens" in str(plan(recipe(stage=Distill(epochs=1.0))))


def test_unknown_teachers_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="one of the known shapes"):
        teacher_config("nobody/nothing-at-all")
    assert len(KNOWN) >= len(PUBLISHED)


def test_plan_of_the_recipe_file_needs_no_network() -> None:
    """A process whose sockets fail prints the plan of recipes/llama3_50pct.py."""
    script = (
        "import runpy, socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network used')\n"
        "socket.socket.connect = refuse\nsocket.getaddrinfo = refuse\n"
        "sys.argv = ['recipes/llama3_50pct.py', '--plan']\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "+16.943 M" in done.stdout and "hours" in done.stdout


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("train", ["all", "mixers"])
def test_lora_counts_what_peft_trains(tmp_path: Path, teacher_folder: Path, train: str) -> None:
    """Trained parameters and bytes held, against the model that the stage would train."""
    from peft import get_peft_model

    convert(str(teacher_folder)).save_pretrained(tmp_path)
    stage = Sft(lora=Lora(rank=4), train=train)
    config, counts = AutoConfig.from_pretrained(tmp_path), plan(recipe(str(teacher_folder))).counts
    trained, held = adapted(config, counts, stage, Lora(rank=4))
    frozen = lora.load_frozen(str(tmp_path), Lora(rank=4), "bf16")
    model = get_peft_model(frozen, lora.config(frozen, Lora(rank=4), train))
    assert trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert held == pytest.approx(sum(weight.numel() * weight.element_size() for weight in model.parameters()), rel=0.01)


def test_lora_fits_where_whole_training_does_not() -> None:
    """Llama-3-8B: 8.3e9 weights at 16 bytes, or in bf16, or in 4 bits, under 1% of it trained."""
    whole, half, four, reference = (
        str(plan(recipe(stage=stage))) for stage in (Sft(), Sft(lora=Lora()), Sft(lora=Lora(bits=4)), Dpo(lora=Lora(), precompute=False))
    )
    assert "student 30.9, gradients 30.9, moments 61.9" in whole and "ZeRO-3" in whole
    assert "student 15.6, gradients 0.2, moments 0.3, teacher 0.0" in half and "(all, LoRA of rank 16)" in half and "ZeRO-3" not in half
    assert "student 5.6, gradients 0.2" in four and "teacher 0.0" in reference


def test_a_stage_with_a_larger_teacher() -> None:
    """70.55e9 weights in bf16, in 4 bits, or run once before training."""
    settings = dict(teacher="meta-llama/Llama-3.1-70B-Instruct", tokens=1_000_000)
    whole, four, offline = (
        str(plan(recipe("meta-llama/Llama-3.1-8B-Instruct", Distill(**settings, **more))))
        for more in ({}, {"teacher_bits": 4}, {"offline": 64})
    )
    assert "teacher 131.4," in whole and "teacher 32.9," in four
    assert "teacher 0.0," in offline and "the teacher (131.4 GiB) runs once: 516 bytes on disk for each target" in offline
    with pytest.raises(ValueError, match="must share a vocabulary, got 128256 tokens in the student and 51200 in microsoft/phi-1_5"):
        str(plan(recipe(stage=Distill(teacher="microsoft/phi-1_5"))))
    by_spans = str(plan(recipe(stage=Distill(teacher="microsoft/phi-1_5", match="spans"))))
    assert "    teacher microsoft/phi-1_5: 1,418" in by_spans and "V 51,200" in by_spans
    assert "it counts other tokens: spans of text at temperature 100" in by_spans
    alike = str(plan(recipe("meta-llama/Llama-3.1-8B-Instruct", Distill(**settings, match="spans"))))
    assert "it counts the same tokens, which are compared, if its tokenizer is the same" in alike


LAPTOP = Machine("cpu", "CPU core", 2, 2**40, {"bf16": 1e15, "fp32": 5e14})


def here(stage: Stage, machine: Machine = LAPTOP) -> str:
    return next(line for line in str(plan(recipe(stage=stage), machine)).splitlines() if line.startswith("    here: "))


def test_time_on_this_machine() -> None:
    """Minutes by hand: 2 operations for each weight that a token meets, teacher once, student twice, trained weights once more."""
    made = plan(recipe())
    embedding, attention = 128256 * 4096, 2 * 2048 * 4096
    teacher = 2 * (8_030_261_248 - embedding) + 32 * attention
    student = 2 * (made.counts.student - embedding) + 16 * attention
    seconds = 10**9 * (teacher + 2 * student + 2 * made.counts.mixers) / (1e15 * REACHED)
    assert f"here: {seconds / 3600:.1f} hours on 2 x CPU core at 50% of the products just measured" in here(Distill(tokens=10**9))
    assert f"here: {2 * seconds / 3600:.1f} hours" in here(Distill(tokens=10**9, precision="fp32"))
    assert f"here: {seconds / 60 / 20:.0f} minutes" in here(Distill(tokens=5 * 10**7))
    assert f"here: {seconds / 60 / 1000:.0f} minutes per 1,000,000 tokens" in here(Distill())
    assert "here: less than a minute per 1,000,000 tokens" in here(Distill(), replace(LAPTOP, rates={"bf16": 1e16}))
    assert "of 1024.0 GiB" in here(Distill())
    layers_alone = teacher - 2 * embedding + 6 * made.counts.mixers
    assert f"here: {10**8 * layers_alone / (1e15 * REACHED) / 60:.0f} minutes" in here(Hidden(tokens=10**8))


def test_memory_that_is_not_here_and_gpus_that_are() -> None:
    small = replace(LAPTOP, memory=16 * 2**30)
    assert re.search(r"here: does not fit: \d+\.\d GiB are needed, and there are 16\.0", here(Distill(tokens=10**9), small))
    gpus = Machine("cuda", "NVIDIA H100", 8, 80 * 2**30, {"bf16": 1e15})
    assert "on 8 x NVIDIA H100 at 40% of the products just measured, a share that is supposed" in here(Distill(tokens=10**9), gpus)
    text = str(plan(recipe(stage=Distill(tokens=10**9)), gpus))
    assert "machine   8 x NVIDIA H100, 80.0 GiB; products of matrices, just measured: 1,000,000 GFLOP/s in bf16" in text
    assert "    or: 4." in text and "hours on 8 H100 at 40% of peak" in text
    assert "here:" not in str(plan(recipe()))


def test_the_machine_is_measured(teacher_folder: Path) -> None:
    """Rates of this very process, in the number formats that the stages train in, and the teacher's own size."""
    stages = [Hidden(tokens=1000, precision="fp32"), Distill(tokens=1000, precision="fp32", skip=True)]
    made = plan_here(replace(recipe(str(teacher_folder)), stages=stages))
    assert made.machine is not None and list(made.machine.rates) == ["fp32"] and 1e7 < made.machine.rates["fp32"] < 1e14
    assert 2**28 < made.machine.memory < 2**50
    if made.machine.kind == "cpu":
        assert made.machine.devices == torch.get_num_threads()
    own = sum(value.numel() for value in AutoModelForCausalLM.from_pretrained(teacher_folder).parameters())
    assert f"{teacher_folder}: {own / 1e6:.3f} M parameters (4 layers, D 32, V " in str(made)
    assert " on 1 H100" in str(made) and set(measured(made.teacher, ["bf16", "fp32"], 0.02).rates) == {"bf16", "fp32"}
    assert plan_here(replace(recipe(str(teacher_folder)), stages=stages[1:])).machine is None
