"""Kept logits: shards that are whole, broken or killed, what they hold, training on them; and what else a teacher may be."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamba.data.batches import Ordered, Rows, collate
from llamba.data.tokens import StageData
from llamba.models import loading
from llamba.settings import Distill
from llamba.stages import distill
from llamba.training import stored_logits as offline
from llamba.training.losses import IGNORE
from llamba.training.metrics import METRICS, read_metrics
from llamba.training.trainer import DistillTrainer, place_teacher, training_arguments

SHORT = dict(batch=8, micro_batch=4, precision="fp32", lr=5e-3, warmup=0, kl=1.0, ce=0.5, log_every=1, save_every=100, clip=1.0)
KEPT5 = Distill(**SHORT, offline=5, temperature=2.0, steps=2)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(offline, "_SHARD_BYTES", 4000)


def make(stage: Distill, data: StageData, teacher: Path, folder: Path, load=None) -> offline.RowsWithLogits:
    loader = load or partial(loading.load_teacher, str(teacher), stage.precision)
    return offline.store_logits(stage, data.folder / "train", str(teacher), loader, folder)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def never() -> None:
    pytest.fail("the teacher was loaded again")


# shards


def test_they_hold_the_teacher_at_the_targets(tmp_path, small_shards, data, teacher_folder):
    """Row by row, without padding, against whole logits in fp64."""
    rows, teacher = make(KEPT5, data, teacher_folder, tmp_path), AutoModelForCausalLM.from_pretrained(teacher_folder).double()
    assert len(rows.shards) > 5
    for index in range(len(rows)):
        item = rows[index]
        with torch.no_grad():
            logits = teacher(torch.from_numpy(item["input_ids"])[None]).logits[0, :-1]
        p = F.softmax(logits[torch.from_numpy(item["labels"])[1:] != IGNORE] / 2.0, -1)
        best = p.sort(-1, descending=True)
        assert (torch.from_numpy(item["kept_indices"]) == best.indices[:, :5]).all()
        torch.testing.assert_close(torch.from_numpy(item["kept_values"]).double().exp(), best.values[:, :5], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.from_numpy(item["kept_tail"]).double().exp(), best.values[:, 5:].sum(-1), rtol=1e-4, atol=1e-6)


def test_broken_shards_are_made_again_and_reported(tmp_path, small_shards, capsys, data, teacher_folder):
    shards = make(KEPT5, data, teacher_folder, tmp_path).shards
    whole = bytes_of(tmp_path)
    capsys.readouterr()
    make(KEPT5, data, teacher_folder, tmp_path, never)
    assert not capsys.readouterr().out
    for number, size in ((1, -1), (2, 4), (3, 0)):
        content = shards.path(number).read_bytes()
        shards.path(number).write_bytes(content[:size])
    shards.path(4).rename(offline._partial(shards.path(4)))
    save_file({"values": torch.zeros(1, 5)}, shards.path(5))
    shards.path(6).unlink()
    make(KEPT5, data, teacher_folder, tmp_path)
    said = capsys.readouterr().out
    assert [said.count(f"{shards.path(number)}") for number in range(7)] == [0, 1, 1, 1, 1, 1, 0]
    assert said.count("cut short or broken, and is made again") >= 3 and "was interrupted" in said
    assert "holds something else" in said and "6 of 6 shards" in said
    assert bytes_of(tmp_path) == whole


KILLED = """
import os, signal, sys
from functools import partial
from pathlib import Path
from llamba.models import loading
from llamba.training import stored_logits as offline
from llamba.settings import Distill

teacher, rows, folder, settings = sys.argv[1:]
offline._SHARD_BYTES, own = 4000, offline.save_file

def save(tensors, path):
    own(tensors, path)
    if path.name.startswith("00003"):
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

offline.save_file = save
offline.store_logits(Distill(**eval(settings)), Path(rows), teacher, partial(loading.load_teacher, teacher, "fp32"), Path(folder))
"""


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bytes(tmp_path, small_shards, capsys, data, teacher_folder):
    make(KEPT5, data, teacher_folder, tmp_path / "whole")
    settings = repr(dict(**SHORT, offline=5, temperature=2.0, steps=2))
    arguments = [str(teacher_folder), str(data.folder / "train"), str(tmp_path / "parts"), settings]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=os.environ | threads, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = bytes_of(tmp_path / "parts")
    assert sum(name.endswith(".safetensors") for name in kept) == 3 and sum(name.endswith(".partial") for name in kept) == 1
    capsys.readouterr()
    make(KEPT5, data, teacher_folder, tmp_path / "parts")
    assert "00003.safetensors was interrupted, and is made again" in capsys.readouterr().out
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_every_process_makes_its_part(tmp_path, small_shards, monkeypatch, data, teacher_folder):
    rows = Rows(data.folder / "train")
    shards, load = offline.Shards(rows, 5, tmp_path), partial(loading.load_teacher, str(teacher_folder), "fp32")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        offline._fill(KEPT5, rows, shards, load)
        there = {number for number in range(len(shards)) if not shards.fault(number)}
        assert there == (set(range(1, len(shards), 2)) if rank else set(range(len(shards))))


def test_what_they_depend_on(tmp_path, data, teacher_folder, small, tokenizer):
    make(KEPT5, data, teacher_folder, tmp_path)
    make(Distill(**{**SHORT, "kl": 0.3, "lr": 1e-3}, offline=5, temperature=2.0, divergence="jsd"), data, teacher_folder, tmp_path, never)
    small.llama(len(tokenizer), seed=3).save_pretrained(tmp_path / "other")
    make(KEPT5, data, tmp_path / "other", tmp_path)
    make(Distill(**SHORT, offline=5), data, teacher_folder, tmp_path)
    made = [json.loads(path.read_text()) for path in tmp_path.rglob("logits.json")]
    assert len(made) == 3 and {(Path(one["teacher"]).name, one["temperature"]) for one in made} >= {("other", 2.0)}


def test_bad_settings(tmp_path, data, teacher_folder):
    with pytest.raises(ValueError, match="distill.offline must be at most the vocabulary's 300 tokens, got 301"):
        make(Distill(**SHORT, offline=301), data, teacher_folder, tmp_path, never)
    with pytest.raises(ValueError, match="distill.offline must be a number > 0, got 0"):
        Distill(offline=0)
    with pytest.raises(ValueError, match="needs reduction='token_mean', got 'batchmean_legacy'"):
        Distill(offline=5, reduction="batchmean_legacy")
    with pytest.raises(ValueError, match="offline_folder needs distill.offline"):
        Distill(offline_folder="logits")
    with pytest.raises(ValueError, match="beta must be between 0 and 1"):
        Distill(divergence="jsd", beta=0.0)
    broken = AutoModelForCausalLM.from_pretrained(teacher_folder)
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="the teacher's logits must be finite"):
        make(KEPT5, data, teacher_folder, tmp_path, lambda: broken)


# training on them


def train(stage: Distill, data: StageData, student: str, teacher: Path, out: Path) -> list[dict]:
    distill.run(stage, student, str(teacher), data, out)
    return read_metrics(out / METRICS)


@pytest.fixture
def with_eval(tmp_path, data) -> StageData:
    """The training rows once more as held-out rows."""
    for split in ("train", "eval"):
        (tmp_path / "data" / split).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / split).symlink_to(data.folder / "train")
    return StageData(data.config, 0, tmp_path / "data")


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_all_tokens_kept_is_the_online_loss(tmp_path, monkeypatch, with_eval, student_folder, teacher_folder, divergence):
    settings = dict(**SHORT, steps=4, temperature=2.0, divergence=divergence)
    online = train(Distill(**settings), with_eval, student_folder, teacher_folder, tmp_path / "1-distill")
    kept = train(Distill(**settings, offline=300), with_eval, student_folder, teacher_folder, tmp_path / "2-distill")
    assert (tmp_path / "logits").is_dir() and len(online) == len(kept) == 5
    for one, other in zip(online, kept, strict=True):
        for key in one.keys() - {"tokens_per_s"}:
            assert one[key] == pytest.approx(other[key], rel=2e-5), key
    monkeypatch.setattr(distill, "load_teacher", never)  # the third run finds them
    again = train(Distill(**settings, offline=300), with_eval, student_folder, teacher_folder, tmp_path / "3-distill")
    assert again[-1]["eval_loss"] == kept[-1]["eval_loss"]


def test_coarser_buckets_have_less_kl(tmp_path, data, student_folder, teacher_folder):
    settings = dict(**SHORT, steps=1)
    online = train(Distill(**settings), data, student_folder, teacher_folder, tmp_path / "on")[0]
    kept = [train(Distill(**settings, offline=k), data, student_folder, teacher_folder, tmp_path / f"{k}")[0] for k in (1, 32, 290)]
    assert 0 < kept[0]["kl"] < kept[1]["kl"] < kept[2]["kl"] < online["kl"] < 1.01 * kept[2]["kl"]
    assert kept[0]["ce"] == pytest.approx(online["ce"], rel=1e-6)


# other teachers


def test_a_wider_teacher(tmp_path, data, student_folder, teacher_folder, small, tokenizer):
    """The stage's own teacher stands in for the recipe's; its first loss is that of whole logits."""
    wide = small.llama(len(tokenizer), seed=7, hidden_size=64, num_hidden_layers=5)
    wide.save_pretrained(tmp_path / "wide")
    stage = Distill(**{**SHORT, "micro_batch": 8}, steps=3, teacher=str(tmp_path / "wide"))
    lines = train(stage, data, student_folder, teacher_folder, tmp_path / "out")
    rows = data.rows("train")
    batch = collate([Ordered(rows, 8, 0, epochs=1, steps=1, tokens=None)[index] for index in range(8)], 2)
    inputs, chosen = {key: batch[key] for key in ("input_ids", "attention_mask")}, batch["labels"][:, 1:] != IGNORE
    student = AutoModelForCausalLM.from_pretrained(student_folder).double()
    with torch.no_grad():
        p, q = (F.softmax(model(**inputs).logits[:, :-1][chosen].double(), -1) for model in (wide.double(), student))
    assert lines[0]["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert lines[-1]["kl"] < lines[0]["kl"]


def test_a_missing_teacher(tmp_path, data, student_folder, teacher_folder):
    stage = Distill(**SHORT, steps=1, teacher=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere must be a model folder, a run folder, a GGUF file or a hub name"):
        distill.run(stage, student_folder, str(teacher_folder), data, tmp_path / "out")


@pytest.mark.parametrize("more", [{}, {"offline": 5}])
def test_the_same_number_of_other_tokens(tmp_path, data, student_folder, teacher_folder, more):
    """Two ordinary tokens have changed places in the teacher's vocabulary."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for path in teacher_folder.iterdir():
        (teacher / path.name).write_bytes(path.read_bytes())
    text = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    first, second = [token for token, number in vocabulary.items() if number in (100, 101)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (teacher / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="must share a vocabulary, got 2 ids with different tokens: "):
        distill.run(Distill(**SHORT, steps=1, **more), student_folder, str(teacher), data, tmp_path / "out")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kept", [None, 5])
def test_a_quantised_teacher(tmp_path, monkeypatch, data, student_folder, teacher_folder, small, tokenizer, bits, kept):
    pytest.importorskip("bitsandbytes")
    heads = dict(hidden_size=64, intermediate_size=64, num_key_value_heads=4, head_dim=16)  # 4 bits on a CPU: multiples of 32
    small.llama(len(tokenizer), seed=7, **heads).save_pretrained(tmp_path / "wide")
    found = []
    own = loading.load_teacher
    monkeypatch.setattr(distill, "load_teacher", lambda *args: found.append(own(*args)) or found[-1])
    stage = Distill(**SHORT, steps=2, teacher=str(tmp_path / "wide"), offline=kept)
    exact = train(stage, data, student_folder, teacher_folder, tmp_path / "exact")
    stage = Distill(**SHORT, steps=2, teacher=str(tmp_path / "wide"), teacher_bits=bits, offline=kept)
    lines = train(stage, data, student_folder, teacher_folder, tmp_path / "out")
    assert type(found[-1].model.layers[0].mlp.up_proj).__name__ == ("Linear8bitLt" if bits == 8 else "Linear4bit")
    assert exact[0]["kl"] != lines[0]["kl"] == pytest.approx(exact[0]["kl"], rel=0.1 if bits == 8 else 0.5)


def test_quantised_without_the_package_or_with_shards(monkeypatch, teacher_folder):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="teacher_bits=4 needs the package bitsandbytes, which is not installed; pip install"):
        loading.load_teacher(str(teacher_folder), "bf16", 4, "cpu")
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    teacher.is_quantized = True
    for kind, plugin in (("FSDP", None), ("DEEPSPEED", SimpleNamespace(zero_stage=3))):
        state = SimpleNamespace(deepspeed_plugin=plugin)
        with pytest.raises(ValueError, match="needs one process, DDP or ZeRO-2, got sharded weights"):
            place_teacher(teacher, SimpleNamespace(distributed_type=kind, state=state))


# the published loss


def test_legacy_is_the_published_loss(tmp_path, data, student_folder, teacher_folder):
    """Passes of 4 rows: each cross-entropy a mean over its targets, each KL a sum over its positions by 4; and their plain mean."""
    stage = Distill(**{**SHORT, "clip": 0.0}, steps=1, train="all", reduction="batchmean_legacy")
    ordered = Ordered(data.rows("train"), stage.batch, 0, epochs=1, steps=1, tokens=None)
    student_model, teacher_hidden = distill._load(stage, student_folder, str(teacher_folder))
    args = training_arguments(stage, 1, 0, tmp_path / "checkpoints")
    trainer = DistillTrainer(
        student_model, teacher_hidden, partial(distill.objective, stage), args, ordered, tmp_path / METRICS, None, True
    )
    student, teacher = (AutoModelForCausalLM.from_pretrained(name).double() for name in (student_folder, teacher_folder))
    losses = []
    for part in (range(4), range(4, 8)):
        batch = collate([ordered[index] for index in part], student_model.config.pad_token_id)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits = student(**inputs).logits
        with torch.no_grad():
            p = F.softmax(teacher(**inputs).logits, -1)
        kl = F.kl_div(F.log_softmax(logits, -1), p, reduction="batchmean")
        ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        losses.append(0.5 * ce + kl)
    (sum(losses) / 2).backward()
    caught = {}
    trainer.create_optimizer().register_step_pre_hook(
        lambda *_: caught.update({name: w.grad.double() for name, w in student_model.named_parameters()})
    )
    trainer.train()
    for name, weight in student.named_parameters():
        assert (caught[name] - weight.grad).norm() <= 2e-4 * weight.grad.norm() + 1e-7, name
    assert load_file(Path(student_folder) / "model.safetensors").keys() <= caught.keys() | {"lm_head.weight"}
