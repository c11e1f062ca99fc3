"""LoRA: what it changes, and that the folder it leaves is an ordinary one. QLoRA where bitsandbytes is installed."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamba.data.tokens import StageData, tokenize
from llamba.models.convert import convert
from llamba.settings import Data, Dpo, Lora, Sft
from llamba.stages import dpo, sft
from llamba.training import lora
from llamba.training.trainer import train_and_save

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # TRL asks by the old name
SHORT = dict(batch=8, micro_batch=8, lr=2e-2, warmup=0, log_every=1, steps=3)
KEPT = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.fixture(scope="module", params=["mamba2", "mamba1", "auto", "gated_delta", "kda", "mamba3"])
def student(request, tmp_path_factory, teacher_folder, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("student")
    convert(str(teacher_folder), mixer=request.param, init="paper").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chats(tmp_path_factory, chat_file, tokenizer) -> StageData:
    folder = tmp_path_factory.mktemp("chats") / "set"
    tokenize(Data(train=str(chat_file), length=48), tokenizer, "answers", folder)
    return StageData(Data(train=str(chat_file)), 0, folder)


def test_projections_of_every_kind_are_changed(student):
    model = AutoModelForCausalLM.from_pretrained(student)
    mixer = {"self_attn.in_proj", "self_attn.out_proj"} | (
        {"self_attn.dt_proj"} if model.config.mixer["kind"] in ("mamba1", "kda") else set()
    )
    found = {train: set(lora.targets(model, train)) for train in ("all", "all_but_mlps", "mixers")}
    layers = {number: {name.split(".", 3)[3] for name in found["all"] if name.startswith(f"model.layers.{number}.")} for number in range(4)}
    assert layers == {0: mixer | MLP, 1: KEPT | MLP, 2: mixer | MLP, 3: KEPT | MLP}
    assert found["all_but_mlps"] == {name for name in found["all"] if ".mlp." not in name}
    assert found["mixers"] == {f"model.layers.{number}.{name}" for number in (0, 2) for name in mixer}


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_folder_is_an_ordinary_one(tmp_path, monkeypatch, chats, preferred_pairs, student, name):
    """The same weights as without LoRA, under the same names; its logits are the adapter model's; peft is not needed."""
    chosen = {"lora": Lora(rank=4), "precision": "fp32", **SHORT}
    if name == "sft":
        trainer = sft.trainer_of(Sft(**chosen), student, chats, tmp_path)
    else:
        trainer = dpo.trainer_of(Dpo(**chosen), student, "", preferred_pairs, tmp_path)
    assert {kind.rpartition(".")[2] for kind, weight in trainer.model.named_parameters() if weight.requires_grad} == {"weight"}
    assert all("lora_" in kind for kind, weight in trainer.model.named_parameters() if weight.requires_grad)
    train_and_save(trainer, tmp_path, dict)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = trainer.model.eval().double()(ids).logits  # in fp32 two orders of the same sums differ by 1.1e-5 at logits of 4.5
    before, after = load_file(f"{student}/model.safetensors"), load_file(tmp_path / "model.safetensors")
    targets = {f"{target}.weight" for target in lora.targets(AutoModelForCausalLM.from_pretrained(student), "all")}
    assert before.keys() == after.keys() and {key for key in before if not torch.equal(before[key], after[key])} == targets
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints",
        "config.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
    }
    monkeypatch.setitem(sys.modules, "peft", None)
    merged, untrained = (AutoModelForCausalLM.from_pretrained(folder).double() for folder in (tmp_path, student))
    with torch.no_grad():
        assert (merged(ids).logits - expected).abs().max() < 1e-5  # the sums are stored in fp32
        assert (untrained(ids).logits - expected).abs().max() > 1e-5


@pytest.fixture(scope="module")
def preferred_pairs(tmp_path_factory, small, tokenizer) -> StageData:
    from llamba.data import pairs

    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"prompt": chat["messages"][:1], "chosen": "red green", "rejected": "cat dog"} for chat in small.chats(16)]
    rows = [{**row, "prompt": row["prompt"][0]["content"]} for row in rows]
    config = Data(train=str(small.write_rows(folder / "pairs.jsonl", rows)), length=48)
    pairs.tokenize_pairs(config, tokenizer, "pairs", folder / "set")
    return StageData(config, 0, folder / "set")


def test_frozen_weights_are_halved_in_bf16(tmp_path, chats, student):
    """Only the adapters (and what must be) are fp32; the updates are added to the fp32 weights."""
    trainer = sft.trainer_of(Sft(lora=Lora(rank=2), **SHORT), student, chats, tmp_path)
    dtypes = {name: weight.dtype for name, weight in trainer.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name or "A_log" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "base_layer" in name} == {torch.bfloat16}
    train_and_save(trainer, tmp_path, dict)
    before, after = load_file(f"{student}/model.safetensors"), load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.mlp.up_proj"
    a, b = (trainer.model.get_parameter(f"base_model.model.{key}.lora_{side}.default.weight").float() for side in "AB")
    torch.testing.assert_close(after[f"{key}.weight"], before[f"{key}.weight"] + (32 / 2) * b @ a)


def test_what_is_missing_is_named(tmp_path, monkeypatch, chats, student):
    find = importlib.util.find_spec
    for package, setting in (("bitsandbytes", {"bits": 4}), ("peft", {})):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, missing=package: None if name == missing else find(name))
        with pytest.raises(ValueError, match=rf"needs {package}: pip install 'llamba\[q?lora\]'"):
            sft.trainer_of(Sft(lora=Lora(**setting), **SHORT), student, chats, tmp_path)


def test_sharded_models_are_refused(tmp_path, chats, student):
    stage = Sft(lora=Lora(), **SHORT)
    trainer = sft.trainer_of(stage, student, chats, tmp_path)
    trainer.accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match="lora is for models that fit on one device"):
        trainer.begin(stage, student, trainer.train_dataset, None)
