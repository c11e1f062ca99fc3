"""TRL's other trainers on the hybrid, and both stages on real rows, killed and run again. Most of it slow."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamba.data import sources
from llamba.models.convert import convert
from llamba.running import run
from llamba.settings import Data, Dpo, Recipe, Sft, Student
from llamba.training.metrics import METRICS, read_metrics
from llamba.training.trainer import CHECKPOINTING

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # TRL asks by the old name
ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("LLAMBA_TEST_DATA", "/nonexistent"))
SHORT = dict(batch=8, micro_batch=4, precision="fp32", lr=1e-3, warmup=0, log_every=1)
FEW = dict(max_steps=2, per_device_train_batch_size=4, bf16=False, use_cpu=True, report_to="none", logging_steps=1, save_strategy="no",
           disable_tqdm=True, dataloader_pin_memory=False, learning_rate=1e-3, **{CHECKPOINTING: False})  # fmt: skip


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher_folder, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("student")
    convert(str(teacher_folder), mixer="mamba2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def hybrid(student: str):
    return AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)


def took_two_steps(trainer, student: str) -> None:
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2 and all(torch.isfinite(torch.tensor(losses)))
    before = hybrid(student).state_dict()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in moved if "layers.0.self_attn" in name}  # a mixer's weights, among others


@pytest.mark.slow
def test_kto(tmp_path, small, tokenizer, student):
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": chat["messages"][:1], "completion": chat["messages"][1:2], "label": bool(number % 2)}
            for number, chat in enumerate(small.chats(16))]  # fmt: skip
    args = KTOConfig(str(tmp_path), **FEW)
    took_two_steps(
        KTOTrainer(hybrid(student), hybrid(student), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer), student
    )


@pytest.mark.slow
def test_grpo(tmp_path, small, tokenizer, student):
    """Rewards for length, of four sampled answers each."""
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": chat["messages"][:1]} for chat in small.chats(8)]
    args = GRPOConfig(str(tmp_path), num_generations=4, max_completion_length=12, **FEW)
    reward = lambda completions, **_: [float(len(answer[0]["content"])) for answer in completions]  # noqa: E731
    trainer = GRPOTrainer(hybrid(student), reward, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    took_two_steps(trainer, student)


@pytest.mark.slow
def test_on_policy_distillation_recipe(tmp_path, teacher_folder, chat_file, student):
    flags = ["--model", student, "--teacher", str(teacher_folder), "--data", str(chat_file), "--output_dir", str(tmp_path / "out"),
             "--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "true", "--bf16", "false", "--max_new_tokens", "8",
             "--max_length", "48", "--lmbda", "1.0", "--logging_steps", "1", "--learning_rate", "1e-3"]  # fmt: skip
    command = [sys.executable, str(ROOT / "recipes" / "experimental" / "on_policy.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    before, after = load_file(Path(student) / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaHybridForCausalLM"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


@pytest.mark.skipif(not DATA.is_dir(), reason="LLAMBA_TEST_DATA does not name the folder of test data")
def test_alpaca_and_preferences_through_both_stages(tmp_path, small):
    """Real instructions and the 300 real pairs: SFT on packed rows, DPO on its result, from one recipe."""
    chat, pairs = DATA / "chat" / "alpaca_gpt4_1k.jsonl.gz", DATA / "chat" / "preferences_300.jsonl.gz"
    tokenizer = small.tokenizer([message["content"] for _, row in sources.rows(str(chat)) for message in row["messages"]], 3000)
    teacher = tmp_path / "teacher"
    model = small.llama(len(tokenizer))
    model.config.max_position_embeddings = 2048
    model.save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    stages = [
        Sft(**SHORT, steps=6, data=Data(train=str(chat), length=1024, packing=True)),
        Dpo(**{**SHORT, "micro_batch": 2}, steps=2, data=Data(train=str(pairs), length=2048)),
    ]
    recipe = Recipe(teacher=str(teacher), student=Student(), data=Data(train=str(chat)), stages=stages, output=str(tmp_path / "run"))
    last = run.run(recipe)
    assert last.name == "2-dpo" and AutoModelForCausalLM.from_pretrained(last).config.model_type == "llamba_llama"
    counts = [json.loads(path.read_text()) for path in (tmp_path / "run" / "data").glob("*/data.json")]
    found = {count["targets"]: count["train"][0] for count in counts}
    assert found["answers"]["rows"] > 990 and found["answers"]["sequences"] < found["answers"]["rows"]
    assert found["pairs"]["rows"] + sum(found["pairs"]["skipped"].values()) == 300 and found["pairs"]["rows"] > 200
    tuned, preferred = (read_metrics(tmp_path / "run" / name / METRICS) for name in ("1-sft", "2-dpo"))
    assert tuned[-1]["loss"] < tuned[0]["loss"]
    assert abs(preferred[0]["loss"] - 0.6931) < 1e-4 and preferred[-1]["kl"] > 0


RECIPE = """
from llamba.settings import Data, Recipe, Student
from llamba import Dpo, Sft, launch

recipe = Recipe(
    teacher={teacher!r}, student=Student(), data=Data(train={chats!r}, length=48, packing=True),
    stages=[Sft(**{short}, steps=10), Dpo(**{short}, steps=10, data=Data(train={pairs!r}, length=48, eval={pairs!r}))],
    output="run",
)
if __name__ == "__main__":
    launch(recipe)
"""


def kill_when(command: list[str], folder: Path, ready) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(), cwd=folder)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline and not ready():
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_stages_end_with_the_same_weights(tmp_path, teacher_folder, chat_file, small):
    """SIGKILL in the midst of SFT, of a checkpoint, of DPO and between; then the same command finishes."""
    rows = [{"prompt": chat["messages"][:1], "chosen": [{"role": "assistant", "content": "red green"}],
             "rejected": [{"role": "assistant", "content": "cat dog"}]} for chat in small.chats(24)]  # fmt: skip
    pairs = small.write_rows(tmp_path / "pairs.jsonl", rows)
    short = {**SHORT, "save_every": 2}
    (tmp_path / "recipe.py").write_text(RECIPE.format(teacher=str(teacher_folder), chats=str(chat_file), pairs=str(pairs), short=short))
    command = [sys.executable, "recipe.py"]
    parts = tmp_path / "parts"

    def steps(stage: str) -> int:
        return len(read_metrics(parts / stage / METRICS))

    for ready in (
        lambda: steps("1-sft") >= 3,
        lambda: any(not (found / "COMPLETE").exists() for found in parts.glob("1-sft/checkpoints/checkpoint-[468]")),
        lambda: (parts / "2-dpo" / "checkpoints" / "reference-train.npy").exists(),
        lambda: steps("2-dpo") >= 5,
        lambda: (parts / "2-dpo" / "model.safetensors").exists(),
    ):
        kill_when([*command, "output=parts"], tmp_path, ready)
    for out in ("parts", "whole"):
        done = subprocess.run([*command, f"output={out}"], capture_output=True, text=True, env=environment(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for stage in ("1-sft", "2-dpo"):
        whole, again = (load_file(tmp_path / out / stage / "model.safetensors") for out in ("whole", "parts"))
        assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole), stage
        lines = [[{**line, "tokens_per_s": 0} for line in read_metrics(tmp_path / out / stage / METRICS)] for out in ("whole", "parts")]
        assert lines[0] == lines[1] and not (parts / stage / "checkpoints").exists()


def test_the_recipe_for_any_converted_model(tmp_path, monkeypatch, small, student, chat_file):
    """Through its own command line, two steps of both stages; the model stays as it was converted."""
    rows = [{"prompt": "a red cat", "chosen": "sings and sleeps", "rejected": "runs"} for _ in range(8)]
    pairs = small.write_rows(tmp_path / "pairs.jsonl", rows)
    chosen = {"data.train": chat_file, "data.length": 64, "data.template": "none", "stages.dpo.data.train": pairs}
    chosen |= {"stages.dpo.data.template": "none", "stages.dpo.data.length": 64, "teacher": student, "output": tmp_path / "run"}
    for stage in ("sft", "dpo"):
        few = {"steps": 2, "batch": 4, "micro_batch": 2, "precision": "fp32", "log_every": 1}
        chosen |= {f"stages.{stage}.{key}": value for key, value in few.items()}
    monkeypatch.setattr(sys, "argv", ["align.py", *(f"{key}={value}" for key, value in chosen.items())])
    runpy.run_path(str(ROOT / "recipes" / "align.py"), run_name="__main__")
    for stage in ("1-sft", "2-dpo"):
        assert [line["step"] for line in read_metrics(tmp_path / "run" / stage / METRICS) if "loss" in line] == [1, 2]
    before, last = (AutoModelForCausalLM.from_pretrained(folder).config for folder in (student, tmp_path / "run" / "2-dpo"))
    assert last.layer_types == before.layer_types and "linear_attention" in last.layer_types
    converted = load_file(tmp_path / "run" / "0-convert" / "model.safetensors")
    assert all(torch.equal(value, converted[name]) for name, value in load_file(Path(student) / "model.safetensors").items())
