"""Training: the run folder, the trainer's loss, what is frozen, resume, and every way in which it may end badly."""

import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from llamba.base.folders import resolve_model
from llamba.data.batches import Ordered, Rows, collate
from llamba.data.tokens import StageData, tokenize
from llamba.models.convert import convert
from llamba.running import run
from llamba.settings import Data, Distill, Recipe, Student, layers_of
from llamba.stages import distill
from llamba.training import checkpoints
from llamba.training.learnable import freeze, join_names, mixer_names
from llamba.training.losses import IGNORE
from llamba.training.metrics import METRICS, read_metrics
from llamba.training.trainer import DistillTrainer, accumulation, place_teacher, run_as_forward, training_arguments

ROOT = Path(__file__).parent.parent
SHORT = dict(batch=8, micro_batch=4, precision="fp32", lr=5e-3, warmup=0, kl=1.0, ce=0.5, log_every=1, save_every=4, clip=1.0)


def trainer_of(stage: Distill, data: StageData, student: str, teacher: str, out: Path) -> DistillTrainer:
    rows = data.rows("train")
    ordered = Ordered(rows, stage.batch, data.seed, epochs=stage.epochs, steps=stage.steps, tokens=stage.tokens)
    args = training_arguments(stage, stage.steps or 1, 0, out / "checkpoints")
    student_model, teacher_model = distill._load(stage, student, teacher)
    return DistillTrainer(student_model, teacher_model, partial(distill.objective, stage), args, ordered, out / METRICS)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# the stage


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_falls_and_only_mixers_move(tmp_path, data, student_folder, teacher_folder, precision, checkpointing):
    stage = Distill(**{**SHORT, "lr": 2e-2, "ce": 0.05, "precision": precision, "gradient_checkpointing": checkpointing}, steps=16)
    metrics = distill.run(stage, student_folder, str(teacher_folder), data, tmp_path)
    lines = read_metrics(tmp_path / METRICS)
    assert [line["step"] for line in lines] == list(range(1, 17)) and metrics == {**lines[-1], "processes": 1}
    assert lines[-1]["kl"] < 0.8 * lines[0]["kl"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["kl"] + 0.05 * line["ce"], rel=1e-4)
    before, after = weights(Path(student_folder)), weights(tmp_path)
    mixers = {name for name in before if ".layers.0.self_attn." in name or ".layers.2.self_attn." in name}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= mixers and {name.rpartition("self_attn.")[2] for name in moved} >= {"in_proj.weight", "A_log"}
    assert not list(tmp_path.glob("*.bin"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded).__name__ == "LlamaHybridForCausalLM" and reloaded.dtype == torch.float32 and reloaded.config.use_cache


def test_everything_can_be_trained(tmp_path, data, teacher_folder, small, tokenizer):
    """A student that is a plain transformer, too: distillation asks nothing of it but hidden states and a head."""
    student = small.llama(len(tokenizer), seed=1)
    student.save_pretrained(tmp_path / "student")
    stage = Distill(**SHORT, steps=4, train="all", temperature=2.0)
    distill.run(stage, str(tmp_path / "student"), str(teacher_folder), data, tmp_path / "out")
    before, after = weights(tmp_path / "student"), weights(tmp_path / "out")
    assert not any(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="needs a student whose mixers have weights"):
        freeze(student, "mixers")


def test_held_out_rows(tmp_path, data, student_folder, teacher_folder):
    stage = Distill(**SHORT, steps=1)
    shutil.copytree(data.folder, tmp_path / "data")
    shutil.copytree(data.folder / "train", tmp_path / "data" / "eval")
    own = data._replace(folder=tmp_path / "data")
    metrics = distill.run(stage, student_folder, str(teacher_folder), own, tmp_path / "out")
    whole = Distill(**{**SHORT, "batch": 64, "micro_batch": 64, "lr": 1e-30}, steps=1)
    expected = distill.run(whole, str(tmp_path / "out"), str(teacher_folder), data, tmp_path / "again")
    for key in ("loss", "kl", "ce"):
        assert metrics[f"eval_{key}"] == pytest.approx(expected[key], rel=1e-5)
    assert [line["step"] for line in read_metrics(tmp_path / "out" / METRICS)] == [1, 1]


def test_other_vocabulary(tmp_path, data, teacher_folder, small):
    small.llama(99).save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="must share a vocabulary, got 99 tokens"):
        distill.run(Distill(**SHORT, steps=1), str(tmp_path / "student"), str(teacher_folder), data, tmp_path / "out")


def test_batch_must_divide(monkeypatch):
    assert accumulation(Distill(batch=64, micro_batch=2)) == 32
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert accumulation(Distill(batch=64, micro_batch=2)) == 4
    with pytest.raises(ValueError, match="distill.batch must be a multiple of micro_batch x processes = 3 x 8, got 64"):
        accumulation(Distill(batch=64, micro_batch=3))


# the loss


def losses_of(stage, data, student, teacher, out) -> list[float]:
    distill.run(stage, student, teacher, data, out)
    return [line["loss"] for line in read_metrics(out / METRICS)]


def test_accumulation_changes_nothing(tmp_path, data, student_folder, teacher_folder):
    """Rows have between 2 and some 40 targets, so a mean of means would differ."""
    runs = [losses_of(Distill(**{**SHORT, "micro_batch": size}, steps=6), data, student_folder, str(teacher_folder), tmp_path / str(size))
            for size in (8, 2)]  # fmt: skip
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_gradient_is_the_mean_over_the_step(tmp_path, data, student_folder, teacher_folder):
    """Two accumulated passes leave the gradient of one fp64 mean over all their targets."""
    stage = Distill(**{**SHORT, "clip": 0.0}, steps=1, train="all")
    trainer = trainer_of(stage, data, student_folder, str(teacher_folder), tmp_path)
    student, teacher = trainer.student, trainer.teacher
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in part]) for part in (range(4), range(4, 8))]
    count = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    student.double(), teacher.double()
    total = sum(distill.objective(stage, student, teacher, batch).loss for batch in batches) / count
    total.backward()
    expected = {name: weight.grad for name, weight in student.named_parameters()}
    student.float().zero_grad(), teacher.float()
    caught = {}
    trainer.create_optimizer().register_step_pre_hook(
        lambda *_: caught.update({name: weight.grad.double() for name, weight in student.named_parameters()})
    )
    trainer.train()
    for name, gradient in expected.items():
        assert (caught[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


def test_no_decay_on_what_is_no_matrix(tmp_path, data, student_folder, teacher_folder):
    trainer = trainer_of(Distill(**SHORT, steps=1), data, student_folder, str(teacher_folder), tmp_path)
    decayed = {name.rpartition(".")[2] if "self_attn" in name else name for name in trainer.get_decay_parameter_names(trainer.student)}
    assert not decayed & {"A_log", "D", "dt_bias", "bias", "model.norm.weight"}
    assert "model.layers.0.mlp.up_proj.weight" in decayed and not any("norm" in name for name in decayed)


def test_inside_restores_forward():
    module = torch.nn.Linear(2, 2)
    x = torch.ones(1, 2)
    wrapped = module.__dict__["forward"] = lambda x: x * 0
    assert run_as_forward(module, module, lambda y: module.weight.sum() * y, x).shape == x.shape and module.__dict__["forward"] is wrapped
    del module.__dict__["forward"]
    with pytest.raises(ZeroDivisionError):
        run_as_forward(module, module, lambda y: 1 / 0, x)
    assert "forward" not in module.__dict__ and module(x).shape == x.shape


@pytest.mark.parametrize("train", ["all", "new"])
def test_fully_sharded_models_give_the_same_sums(tmp_path, data, student_folder, teacher_folder, train):
    """FSDP2 on one process: the loss inside the root's forward pass, the teacher's layers sharded too."""
    stage, rows = Distill(**SHORT, train=train), data.rows("train")
    student, teacher = distill._load(stage, student_folder, str(teacher_folder))
    batch = collate([rows[index] for index in range(4)], pad=2)
    expected = distill.objective(stage, student, teacher, batch)
    gradients = torch.autograd.grad(expected.loss, [weight for weight in student.parameters() if weight.requires_grad])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        plugin = SimpleNamespace(cpu_ram_efficient_loading=False)
        state = SimpleNamespace(fsdp_plugin=plugin)
        place_teacher(teacher, SimpleNamespace(distributed_type=DistributedType.FSDP, device=torch.device("cpu"), state=state))
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for module in (*student.model.layers, student):
            fully_shard(module, mesh=mesh)
        sums = run_as_forward(student, student, partial(distill.objective, stage, student, teacher), batch)
        sums.loss.backward()
        own = [weight.grad.full_tensor() for weight in student.parameters() if weight.requires_grad]
    finally:
        dist.destroy_process_group()
    assert isinstance(teacher.model.layers[0], FSDPModule)
    torch.testing.assert_close(tuple(sums), tuple(expected))
    torch.testing.assert_close(own, list(gradients))


# endings


class Stop(Exception):
    pass


def stop_at(monkeypatch, step: int, when: str) -> None:
    """Raise in place of training step `step + 1`, or in the midst of that step's checkpoint."""
    own = DistillTrainer._save_rng_state if when == "saving" else DistillTrainer.training_step

    def stopping(self, *args):
        if self.state.global_step == step:
            raise Stop
        return own(self, *args)

    monkeypatch.setattr(DistillTrainer, own.__name__, stopping)


@pytest.mark.parametrize("step, when, resumed", [(3, "training", 0), (6, "training", 4), (8, "saving", 4), (10, "saving", 8)])
def test_resume_is_bit_equal(tmp_path, monkeypatch, data, student_folder, teacher_folder, step, when, resumed):
    """Ten steps of eight of 64 rows: the second epoch begins in step 9."""
    stage = Distill(**SHORT, steps=10)
    distill.run(stage, student_folder, str(teacher_folder), data, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, step, when)
        distill.run(stage, student_folder, str(teacher_folder), data, tmp_path / "parts")
    folder = tmp_path / "parts" / "checkpoints"
    assert [found.name for found in checkpoints.complete(folder)] == [f"checkpoint-{resumed}"] * bool(resumed)
    assert (folder / f"checkpoint-{step}").exists() == (when == "saving")
    distill.run(stage, student_folder, str(teacher_folder), data, tmp_path / "parts")
    assert same(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (read_metrics(tmp_path / name / METRICS) for name in ("whole", "parts"))
    assert [{**line, "tokens_per_s": 0} for line in whole] == [{**line, "tokens_per_s": 0} for line in parts]


def test_finished_training_is_only_saved_again(tmp_path, monkeypatch, data, student_folder, teacher_folder):
    stage = Distill(**SHORT, steps=4)
    distill.run(stage, student_folder, str(teacher_folder), data, tmp_path / "out")
    kept = weights(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    monkeypatch.setattr(DistillTrainer, "training_step", lambda *_: pytest.fail("trained again"))
    assert distill.run(stage, student_folder, str(teacher_folder), data, tmp_path / "out")["step"] == 4
    assert all(torch.equal(kept[name], value) for name, value in weights(tmp_path / "out").items())


def test_nan_stops_with_one_message(tmp_path, monkeypatch, data, student_folder, teacher_folder):
    own = distill.objective

    def breaking(stage, student, teacher, batch):
        sums = own(stage, student, teacher, batch)
        return sums if len(read_metrics(tmp_path / METRICS)) < 5 else sums._replace(loss=sums.loss * torch.nan)

    monkeypatch.setattr(distill, "objective", breaking)
    with pytest.raises(ValueError) as caught:
        distill.run(Distill(**SHORT, steps=10), student_folder, str(teacher_folder), data, tmp_path)
    good = tmp_path / "checkpoints" / "checkpoint-4"
    assert str(caught.value).startswith("the loss must be finite, got nan (kl ") and "at step 6" in str(caught.value)
    assert f"the last good checkpoint is {good}" in str(caught.value)
    assert all(value.isfinite().all() for value in weights(good).values())
    AutoModelForCausalLM.from_pretrained(good)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, data, student_folder, teacher_folder):
    trainer = trainer_of(Distill(**SHORT, steps=4), data, student_folder, str(teacher_folder), tmp_path)
    monkeypatch.setattr(trainer, "_require_finite", lambda sums: None)
    own = DistillTrainer.training_step

    def breaking(self, *args):
        loss = own(self, *args)
        if self.state.global_step == 3:
            next(weight for weight in self.student.parameters() if weight.requires_grad).grad.fill_(torch.nan)
        return loss

    monkeypatch.setattr(DistillTrainer, "training_step", breaking)
    with pytest.raises(ValueError, match="weights must be finite, got NaN or infinity in model.layers.0.* at step 4; there is no"):
        trainer.train()
    assert not checkpoints.complete(trainer.folder)


def test_no_room_for_a_checkpoint(tmp_path, monkeypatch, data, student_folder, teacher_folder):
    room = iter([10**12, 10**3])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(room)))
    with pytest.raises(ValueError, match="disk full: saving to .* needs 0.* GiB, 0.000 GiB are free; the last good .*checkpoint-4"):
        distill.run(Distill(**SHORT, steps=10), student_folder, str(teacher_folder), data, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, where the machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("room", [0, 100_000, 300_000])
def test_disk_that_fills_while_saving(small_disk, monkeypatch, teacher_folder, chat_file, room):
    """Even if the check before the save did not see it coming: not a byte left, or too little for the weights or the rest."""
    monkeypatch.setattr(checkpoints, "require_room", lambda folder, needed: None)
    recipe = recipe_of(teacher_folder, chat_file, small_disk / "run", stages=[Distill(**SHORT, steps=10)])
    filler, own = small_disk / "filler", DistillTrainer._save_checkpoint

    def filling(self, *args):
        if self.state.global_step == 8:
            filler.write_bytes(b"0" * (shutil.disk_usage(small_disk).free - room))
        own(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "_save_checkpoint", filling)
        with pytest.raises(ValueError, match="disk full: could not write to .*run; the last good checkpoint is .*checkpoint-4; free some"):
            run.run(recipe)
    AutoModelForCausalLM.from_pretrained(small_disk / "run" / "1-distill" / "checkpoints" / "checkpoint-4")
    filler.unlink()
    assert len(read_metrics(run.run(recipe) / METRICS)) == 10


# the run folder


def recipe_of(teacher_folder, chat_file, out, **changes) -> Recipe:
    parts = dict(teacher=str(teacher_folder), student=Student(), stages=[Distill(**SHORT, steps=2)], output=str(out))
    parts["data"] = Data(train=str(chat_file), length=48)
    return Recipe(**{**parts, **changes})


def test_run_folder(tmp_path, monkeypatch, teacher_folder, chat_file, tokenizer):
    recipe = recipe_of(teacher_folder, chat_file, tmp_path / "run")
    last = run.run(recipe)
    assert last == tmp_path / "run" / "1-distill" and resolve_model(tmp_path / "run") == str(last)
    files = {path.name for path in last.iterdir()}
    assert files == {"DONE", "stage.json", "metrics.jsonl", "model.safetensors", "config.json", "generation_config.json",
                     "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip
    assert AutoTokenizer.from_pretrained(last).chat_template == tokenizer.chat_template
    report = json.loads((last / "stage.json").read_text())
    assert report["config"]["lr"] == SHORT["lr"] and report["results"]["step"] == 2
    assert report["versions"]["torch"] == importlib.metadata.version("torch")  # torch.__version__ may add the build, as in +cu130
    (manifest,) = (tmp_path / "run" / "data").glob("assistant-*/data.json")
    assert json.loads(manifest.read_text())["train"][0]["rows"] == 64
    assert "converted" in json.loads((tmp_path / "run" / "0-convert" / "conversion.json").read_text())
    stamps = {path: path.stat().st_mtime_ns for path in last.iterdir()}
    run.run(recipe)
    assert stamps == {path: path.stat().st_mtime_ns for path in last.iterdir()}
    shutil.rmtree(last)
    assert resolve_model(tmp_path / "run") == str(tmp_path / "run" / "0-convert")


def test_folder_of_another_recipe(tmp_path, teacher_folder, chat_file):
    run.run(recipe_of(teacher_folder, chat_file, tmp_path / "run"))
    before = (tmp_path / "run" / "recipe.json").read_text()
    other = recipe_of(teacher_folder, chat_file, tmp_path / "run", student=Student(attention=0.25), seed=3)
    with pytest.raises(ValueError, match=r"another recipe \(seed: 0 -> 3; student.attention: 0.5 -> 0.25\); give the old values, choose"):
        run.run(other)
    assert (tmp_path / "run" / "recipe.json").read_text() == before


def test_stages_that_have_not_begun_may_change(tmp_path, teacher_folder, chat_file):
    recipe = recipe_of(teacher_folder, chat_file, tmp_path / "run")
    run.run(recipe)
    with pytest.raises(ValueError, match=r"another recipe \(stages.0.lr: "):
        run.run(dataclasses.replace(recipe, stages=[Distill(**{**SHORT, "lr": 1e-4}, steps=2)]))
    assert run.run(dataclasses.replace(recipe, stages=[*recipe.stages, Distill(**SHORT, steps=1)])).name == "2-distill"


def test_what_the_result_does_not_depend_on_may_change_on_the_way(tmp_path, monkeypatch, teacher_folder, chat_file):
    """As after running out of memory: smaller forward passes, layers computed twice."""
    stages = [Distill(**SHORT, steps=6)]
    whole = run.run(recipe_of(teacher_folder, chat_file, tmp_path / "whole", stages=stages))
    recipe = recipe_of(teacher_folder, chat_file, tmp_path / "run", stages=stages)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, 5, "training")
        run.run(recipe)
    less = {"micro_batch": 2, "gradient_checkpointing": True, "save_every": 1}
    last = run.run(dataclasses.replace(recipe, stages=[dataclasses.replace(stages[0], **less)]))
    one, two = (read_metrics(folder / METRICS) for folder in (whole, last))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    (last / "DONE").unlink()
    with pytest.raises(ValueError, match="another recipe .stages.0.batch: 8 -> 16"):
        run.run(dataclasses.replace(recipe, stages=[dataclasses.replace(stages[0], batch=16)]))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_progressive_conversion_resets_nothing(tmp_path, small, chat_file, tokenizer):
    """Half, quarter, none: what one stage trained is what the next starts from, bit for bit."""
    small.llama(len(tokenizer), num_hidden_layers=4).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    stages = [Distill(**SHORT, steps=1, train="all"), *(Distill(**SHORT, steps=1, train="all", attention=part) for part in (0.25, 0.0))]
    run.run(dataclasses.replace(recipe_of(tmp_path / "teacher", chat_file, tmp_path / "run"), stages=stages))
    for number, (old, new) in enumerate((([0, 2], [1]), ([0, 1, 2], [3])), 1):
        before, after = (weights_of(tmp_path / "run" / name) for name in (f"{number}-distill", f"{number + 1}-convert"))
        converted = tuple(f"model.layers.{layer}.self_attn." for layer in new)
        kept = {name for name in before if not name.startswith(converted)}
        assert kept == {name for name in after if not name.startswith(converted)}
        assert all(torch.equal(before[name], after[name]) for name in kept)
        assert any(name.startswith(f"model.layers.{old[0]}.self_attn.") for name in kept)
        assert set(after) - kept and not set(after) - kept & set(before)
    assert json.loads((tmp_path / "run" / "3-distill" / "config.json").read_text())["layer_types"] == ["linear_attention"] * 4


def test_stage_with_data_of_its_own(tmp_path, teacher_folder, chat_file, small):
    own = Data(train=str(small.write_rows(tmp_path / "own.jsonl", small.chats(9))), length=32)
    recipe = recipe_of(teacher_folder, chat_file, tmp_path / "run")
    run.run(dataclasses.replace(recipe, stages=[*recipe.stages, Distill(**SHORT, steps=1, data=own)]))
    read = [json.loads(path.read_text()) for path in (tmp_path / "run" / "data").glob("*/data.json")]
    assert sorted((part["length"], part["train"][0]["rows"]) for part in read) == [(32, 9), (48, 64)]


def test_source_of_a_stage_that_is_not_there(tmp_path, teacher_folder):
    recipe = recipe_of(teacher_folder, "stage:pseudo_label", tmp_path / "run")
    with pytest.raises(ValueError, match="stage:pseudo_label needs an earlier stage 'pseudo_label', and stage 1 has none before it"):
        run.run(recipe)


def test_packed_rows_train_as_rows_apart(tmp_path, student_folder, teacher_folder, chat_file, tokenizer):
    """Summed loss and gradients of all rows: packed, where neither model sees over a boundary, and padded."""
    found = []
    for packing in (False, True):
        tokenize(Data(train=str(chat_file), length=96, packing=packing), tokenizer, "assistant", tmp_path / str(packing))
        rows = Rows(tmp_path / str(packing) / "train")
        student, teacher = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64) for name in (student_folder, teacher_folder))
        sums = distill.objective(Distill(**SHORT), student, teacher, collate([rows[i] for i in range(len(rows))], 0))
        sums.loss.backward()
        found.append((len(rows), sums, {name: weight.grad for name, weight in student.named_parameters() if weight.grad is not None}))
    (apart, one, gradients), (together, other, packed) = found
    assert together < apart / 2 and one.targets == other.targets and set(gradients) == set(packed)
    torch.testing.assert_close(other.loss, one.loss, rtol=1e-10, atol=0)
    for name, gradient in gradients.items():
        assert (packed[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-14, name


def test_two_learning_rates(tmp_path, data, student_folder, teacher_folder):
    stage = Distill(**{**SHORT, "lr": 1e-3}, steps=2, train="all", rest_lr=1e-30)
    distill.run(stage, student_folder, str(teacher_folder), data, tmp_path / "out")
    before, after = weights_of(Path(student_folder)), weights_of(tmp_path / "out")
    student = AutoModelForCausalLM.from_pretrained(student_folder)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and moved <= mixer_names(student) and any("in_proj" in name for name in moved)


def test_projections_have_a_learning_rate_of_their_own(tmp_path, data, student_folder, teacher_folder):
    """Every parameter moves by at most its own rate in a first step of AdamW, and by nearly that where its gradient is not 0."""
    stage = Distill(**{**SHORT, "lr": 1e-3, "warmup": 0, "schedule": "constant"}, steps=1, train="all", projection_lr=1e-4, rest_lr=1e-5)
    distill.run(stage, student_folder, str(teacher_folder), data, tmp_path / "out")
    before, after = weights_of(Path(student_folder)), weights_of(tmp_path / "out")
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    for name, distance in moved.items():
        projection = ".self_attn.in_proj." in name or ".self_attn.out_proj." in name
        own = name in mixer_names(AutoModelForCausalLM.from_pretrained(student_folder))
        assert distance <= 1.01 * (1e-4 if projection and own else 1e-3 if own else 1e-5), name
    assert max(value for name, value in moved.items() if "in_proj" in name) > 9e-5
    assert max(value for name, value in moved.items() if "A_log" in name) > 9e-4


@pytest.mark.parametrize("mixer, join", [("mamba2", "norm.weight"), ("discrete_mamba2", "join")])
def test_joins_have_a_learning_rate_of_their_own(tmp_path, data, teacher_folder, mixer, join):
    """They start where the recurrence's other weights have no gradient, or hardly any, and go further than those in the same steps."""
    student = convert(str(teacher_folder), mixer=mixer, attention=0.5, options={"window": 4, "sinks": 1})
    student.save_pretrained(tmp_path / "student")
    stage = Distill(**{**SHORT, "lr": 1e-4, "warmup": 0, "schedule": "constant"}, steps=1, join_lr=1e-2)
    distill.run(stage, str(tmp_path / "student"), str(teacher_folder), data, tmp_path / "out")
    before, after = student.state_dict(), weights_of(tmp_path / "out")
    moved = {name: (after[name] - before[name]).abs().max().item() for name in join_names(student)}
    assert {name.rpartition("self_attn.")[2] for name in moved} == {join, "rest_bias"} and len(moved) == len(student.config.layer_types)
    assert all(9e-3 < distance <= 1.01e-2 for distance in moved.values()), moved


def test_everything_but_mlps(tmp_path, data, student_folder, teacher_folder):
    distill.run(Distill(**SHORT, steps=2, train="all_but_mlps"), student_folder, str(teacher_folder), data, tmp_path / "out")
    before, after = weights_of(Path(student_folder)), weights_of(tmp_path / "out")
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if ".mlp." in name} <= still
    assert not {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"} & still


def test_schedules():
    def rates(stage: Distill, steps: int) -> list[float]:
        args = training_arguments(stage, steps, 0, Path("unused"))
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        more = args.lr_scheduler_kwargs or {}
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, stage.warmup, steps, scheduler_specific_kwargs=more)
        seen = []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    wsd = rates(Distill(schedule="wsd", warmup=10, decay=0.2), 100)
    assert wsd[:11] == pytest.approx([step / 10 for step in range(11)]) and wsd[10:81] == [1.0] * 71
    assert wsd[80:] == pytest.approx([1 - step / 20 for step in range(20)])
    assert rates(Distill(schedule="cosine", warmup=0, floor=0.1), 1000)[-1] == pytest.approx(0.1, abs=1e-3)


def test_recipe_may_change_while_nothing_is_done(tmp_path, chat_file, teacher_folder):
    with pytest.raises(ValueError, match="student.attention"):
        run.run(recipe_of(teacher_folder, chat_file, tmp_path / "run", student=Student(attention=[99])))
    (tmp_path / "broken.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="broken.jsonl:1: needed one JSON object"):
        run.run(recipe_of(teacher_folder, tmp_path / "broken.jsonl", tmp_path / "run"))
    run.run(recipe_of(teacher_folder, chat_file, tmp_path / "run"))


def test_folder_with_other_things(tmp_path, teacher_folder, chat_file):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="output must be a new folder or a run folder"):
        run.run(recipe_of(teacher_folder, chat_file, tmp_path))


def test_data_that_changed(tmp_path, teacher_folder, small):
    rows = small.write_rows(tmp_path / "rows.jsonl", small.chats(16))
    recipe = recipe_of(teacher_folder, rows, tmp_path / "run")
    last = run.run(recipe)
    small.write_rows(rows, small.chats(17))
    assert run.run(recipe) == last  # what is done needs its data no more
    (last / "DONE").unlink()
    with pytest.raises(ValueError, match="rows.jsonl is not what it was when this run began"):
        run.run(recipe)


def test_layers_from_a_file(tmp_path, teacher_folder, chat_file):
    (tmp_path / "layers.json").write_text("[0, 3]")
    recipe = recipe_of(teacher_folder, chat_file, tmp_path, student=Student(attention=str(tmp_path / "layers.json")))
    assert layers_of(recipe.student.attention) == [0, 3]
    (tmp_path / "layers.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="must hold a JSON list of layer indices"):
        layers_of(recipe.student.attention)
    with pytest.raises(ValueError, match="or a JSON file with such a list, got 'half'"):
        layers_of("half")


def test_resolve_model(tmp_path, teacher_folder):
    assert resolve_model(teacher_folder) == str(teacher_folder)
    assert resolve_model("org/model") == "org/model"
    (tmp_path / "x" / "1-distill").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"must be a model folder \(with config.json\) or a run folder .* found \['1-distill'\]"):
        resolve_model(tmp_path / "x")
    for name in ("./nowhere", "/nowhere/at/all", "a/b/c"):
        with pytest.raises(ValueError, match="found no such folder"):
            resolve_model(name)
    for number in (2, 10):
        (tmp_path / "x" / f"{number}-sft").mkdir()
        (tmp_path / "x" / f"{number}-sft" / "DONE").touch()
        (tmp_path / "x" / f"{number}-sft" / "config.json").touch()
    (tmp_path / "x" / "11-pseudo_label").mkdir()
    (tmp_path / "x" / "11-pseudo_label" / "DONE").touch()  # done, and no model
    assert resolve_model(tmp_path / "x") == str(tmp_path / "x" / "10-sft")
