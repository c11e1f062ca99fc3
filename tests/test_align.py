"""SFT and DPO: what TRL's trainers make of the hybrid, of packed rows, of a reference, of precision; LoRA; every bad input."""

import copy
import dataclasses
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.distributions import Categorical, kl_divergence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import SFTConfig, SFTTrainer

from llamba.data import pairs
from llamba.data.pairs import Pairs
from llamba.data.tokens import StageData, tokenize
from llamba.models.convert import convert
from llamba.settings import DPO_LOSSES, Data, Dpo, Lora, Sft
from llamba.stages import dpo, sft
from llamba.training import checkpoints
from llamba.training.losses import IGNORE
from llamba.training.metrics import METRICS, read_metrics
from llamba.training.trainer import CHECKPOINTING

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # TRL asks by the old name
SHORT = dict(batch=8, micro_batch=4, precision="fp32", lr=5e-3, warmup=0, log_every=1, save_every=4)


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher_folder, tokenizer) -> str:
    """The teacher converted, with mixers in layers 0 and 2 whose every parameter matters."""
    folder = tmp_path_factory.mktemp("student")
    convert(str(teacher_folder), mixer="mamba2", init="paper").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prepared(folder: Path, source: Path, tokenizer, targets: str = "answers", **more) -> StageData:
    config = Data(train=str(source), length=48, **more)
    (pairs.tokenize_pairs if targets == "pairs" else tokenize)(config, tokenizer, targets, folder)
    return StageData(config, 0, folder)


@pytest.fixture(scope="module")
def chats(tmp_path_factory, chat_file, tokenizer) -> StageData:
    return prepared(tmp_path_factory.mktemp("chats") / "set", chat_file, tokenizer, eval=str(chat_file))


@pytest.fixture(scope="module")
def packed(tmp_path_factory, chat_file, tokenizer) -> StageData:
    return prepared(tmp_path_factory.mktemp("packed") / "set", chat_file, tokenizer, packing=True)


def preferences(small, number: int) -> list[dict]:
    """Pairs with the same prompt: the chosen answer counts on, the rejected one does not."""
    rng, rows = random.Random(1), []
    for chat in small.chats(number, seed=5):
        prompt = chat["messages"][:1]
        good = "red green blue " + " ".join(rng.choices(["cat", "dog"], k=rng.randint(1, 6)))
        bad = " ".join(rng.choices(["tree", "house", "bird"], k=rng.randint(1, 6)))
        answers = ([{"role": "assistant", "content": text}] for text in (good, bad))
        rows.append(dict(zip(("prompt", "chosen", "rejected"), (prompt, *answers), strict=True)))
    return rows


@pytest.fixture(scope="module")
def preferred(tmp_path_factory, small, tokenizer) -> StageData:
    folder = tmp_path_factory.mktemp("preferred")
    source = small.write_rows(folder / "pairs.jsonl", preferences(small, 32))
    return prepared(folder / "set", source, tokenizer, "pairs", eval=str(source))


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def one_step(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of a trainer's only step."""
    caught: dict[str, torch.Tensor] = {}
    named = [(name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    hook = lambda *_: caught.update({name: weight.grad.clone() for name, weight in named})  # noqa: E731
    trainer.create_optimizer().register_step_pre_hook(hook)
    trainer.train()
    return trainer.state.log_history[0]["loss"], caught


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 2e-4) -> bool:
    scale = max(value.norm() for value in one.values())
    return one.keys() == other.keys() and all((one[name] - other[name]).norm() <= tolerance * scale for name in one)


# SFT


@pytest.mark.parametrize("rows", ["chats", "packed"])
def test_sft_loss_falls_and_frozen_weights_stay(tmp_path, request, rows, student):
    stage = Sft(**{**SHORT, "lr": 3e-2}, steps=8, train="mixers", schedule="constant")
    metrics = sft.run(stage, student, "", request.getfixturevalue(rows), tmp_path)
    lines = [line for line in read_metrics(tmp_path / METRICS) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert set(lines[0]) == {"step", "loss", "entropy", "mean_token_accuracy", "grad_norm", "lr", "tokens", "tokens_per_s"}
    before, after = weights(student), weights(tmp_path)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".layers.0.self_attn." in name or ".layers.2.self_attn." in name for name in moved)
    assert ("eval_loss" in metrics) == (rows == "chats")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded).__name__ == "LlamaHybridForCausalLM" and reloaded.config.pad_token_id == 2


def test_packed_rows_give_the_loss_and_the_gradients_of_single_ones(tmp_path, chats, packed, student, tokenizer):
    """The same documents alone, packed by us, and packed by TRL; against a plain sum over documents in fp64."""
    stage = Sft(**{**SHORT, "micro_batch": 1, "clip": 0.0}, steps=1)
    found = []
    for name, data in (("alone", chats), ("packed", packed)):
        whole = dataclasses.replace(stage, batch=len(data.rows("train")))
        found.append(one_step(sft.trainer_of(whole, student, data, tmp_path / name)))
    assert len(packed.rows("train")) < 0.8 * len(chats.rows("train"))
    rows = [chats.rows("train")[index] for index in range(len(chats.rows("train")))]
    found.append(one_step(packed_by_trl(tmp_path, rows, student, tokenizer)))
    expected, gradients = summed(rows, student)
    for loss, caught in found:
        assert loss == pytest.approx(expected, rel=1e-5) and close(gradients, caught)


def packed_by_trl(tmp_path, rows, student, tokenizer) -> SFTTrainer:
    columns = [{"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()} for row in rows]
    args = SFTConfig(str(tmp_path / "trl"), packing=True, max_length=48, per_device_train_batch_size=64, max_steps=1, bf16=False,
                     use_cpu=True, report_to="none", logging_steps=1, max_grad_norm=0.0, disable_tqdm=True, save_strategy="no",
                     dataloader_pin_memory=False, **{CHECKPOINTING: False})  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    return SFTTrainer(model, args, train_dataset=Dataset.from_list(columns), processing_class=copy.deepcopy(tokenizer))


def summed(rows, student) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean over target tokens of -log p, document by document, and its gradient, in fp64."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        logits = model(torch.from_numpy(row["input_ids"])[None]).logits[0, :-1].double()
        labels = torch.from_numpy(row["labels"])[1:]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        targets += int((labels != IGNORE).sum())
    (total / targets).backward()
    return total.item() / targets, {name: weight.grad.float() for name, weight in model.named_parameters()}


def test_sft_accumulation_and_held_out_rows(tmp_path, chats, student):
    """A mean of means would differ: answers have between 2 and 13 tokens. The held-out rows are the training rows."""
    losses, stage = [], Sft(**{**SHORT, "lr": 1e-30}, steps=1)
    for size in (2, 64):
        whole = dataclasses.replace(stage, batch=64, micro_batch=size)
        metrics = sft.run(whole, student, "", chats, tmp_path / str(size))
        losses += [metrics["loss"], metrics["eval_loss"]]
        assert metrics["eval_mean_token_accuracy"] == pytest.approx(metrics["mean_token_accuracy"], abs=0.01)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def products(trainer) -> set[torch.dtype]:
    """The dtypes of what the projections of the model's layers return in a step."""
    seen: set[torch.dtype] = set()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Linear) and module is not trainer.model.lm_head:
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    one_step(trainer)
    return seen


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_is_on_inside_the_loss(tmp_path, chats, preferred, student, precision, dtype):
    few = {**SHORT, "precision": precision, "steps": 1}
    assert products(sft.trainer_of(Sft(**few), student, chats, tmp_path / "sft")) == {dtype}
    for precompute in (True, False):
        trainer = dpo.trainer_of(Dpo(**few, precompute=precompute), student, "", preferred, tmp_path / f"dpo{precompute}")
        assert products(trainer) == {dtype}
        assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}


# DPO


def pair_trainer(tmp_path, student, data, teacher="", **changes) -> dpo.DpoStage:
    stage = Dpo(**{**SHORT, "batch": 8, "lr": 1e-30, "beta": 0.5, **changes}, steps=1)
    return dpo.trainer_of(stage, student, str(teacher), data, tmp_path / "out")


def answer_log_probs(folder, rows: Pairs) -> torch.Tensor:
    """Log-probabilities [pairs, 2] of both answers, one sequence at a time, from the model's own logits in fp64."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), []
    for pair in (rows[index] for index in range(len(rows))):
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor(pair["prompt_ids"] + pair[side])
            with torch.no_grad():
                logs = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
            found.append(logs.gather(1, ids[1:, None])[len(pair["prompt_ids"]) - 1 :].sum())
    return torch.stack(found).view(-1, 2)


@pytest.mark.parametrize(
    "changes", [{}, {"precompute": False}, {"lora": Lora(rank=4)}, {"lora": Lora(rank=4), "precompute": False}, {"beta": 0.01}]
)
def test_first_loss_is_ln_2(tmp_path, preferred, student, changes):
    """The student starts as its own reference, whatever holds the reference."""
    trainer = pair_trainer(tmp_path, student, preferred, **changes)
    loss, gradients = one_step(trainer)
    assert loss == pytest.approx(math.log(2), abs=1e-4) and max(value.abs().max() for value in gradients.values()) > 0
    assert trainer.probe and trainer._kl() == pytest.approx(0, abs=1e-5)
    lora_holds_it = "lora" in changes
    assert (trainer.ref_model is None) == (lora_holds_it or changes.get("precompute", True))


@pytest.mark.parametrize("precompute", [True, False])
def test_the_teacher_as_reference(tmp_path, preferred, student, teacher_folder, precompute):
    """Its log-probabilities are those of a forward pass of its own, and the loss is what they and the student's give."""
    trainer = pair_trainer(tmp_path, student, preferred, teacher_folder, reference="teacher", precompute=precompute)
    rows = Pairs(preferred.folder / "train")
    theirs, own = answer_log_probs(teacher_folder, rows), answer_log_probs(student, rows)
    used = trainer.train_dataset.order
    if precompute:
        found = torch.from_numpy(trainer.train_dataset.rows.reference[used])
        assert trainer.ref_model is None
    else:
        batch = trainer.data_collator([rows[index] for index in used])
        found = torch.stack(trainer.compute_ref_log_probs(trainer.ref_model, batch), 1)
    torch.testing.assert_close(found.double(), theirs[used], rtol=1e-5, atol=1e-4)
    margin = (own - theirs)[used, 0] - (own - theirs)[used, 1]
    loss, _ = one_step(trainer)
    assert loss == pytest.approx(-torch.nn.functional.logsigmoid(0.5 * margin).mean().item(), rel=1e-4) and abs(loss - math.log(2)) > 0.05


def test_another_model_as_reference(tmp_path, preferred, student, small):
    small.llama(99).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="student and reference must share a vocabulary, got 300 and 99 tokens"):
        pair_trainer(tmp_path, student, preferred, reference=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="found no such folder"):
        pair_trainer(tmp_path, student, preferred, reference="./nowhere")


def test_dpo_learns_and_says_what_it_does(tmp_path, preferred, student):
    stage = Dpo(**SHORT | {"lr": 3e-3}, steps=8, schedule="constant", precompute=False)
    metrics = dpo.run(stage, student, "", preferred, tmp_path)
    lines = [line for line in read_metrics(tmp_path / METRICS) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-4) and lines[-1]["rewards/accuracies"] == 1
    assert lines[-1]["rewards/margins"] == pytest.approx(lines[-1]["rewards/chosen"] - lines[-1]["rewards/rejected"], abs=1e-4)
    assert lines[-1]["kl"] > lines[0]["kl"] > 0
    assert metrics["eval_rewards/accuracies"] == 1 and metrics["eval_loss"] < 0.4
    own, before = (
        answer_log_probs(tmp_path, Pairs(preferred.folder / "train")),
        answer_log_probs(student, Pairs(preferred.folder / "train")),
    )
    rewards = stage.beta * (own - before).mean(0)
    assert [metrics["eval_rewards/chosen"], metrics["eval_rewards/rejected"]] == pytest.approx(rewards.tolist(), rel=1e-3)


def test_kl_is_that_of_whole_distributions(tmp_path, preferred, student, teacher_folder):
    """Against torch.distributions on the logits of both models, over the answers' tokens of the probe."""
    trainer = pair_trainer(tmp_path, student, preferred, teacher_folder, reference="teacher")
    trainer.model_wrapped = trainer.model
    rows = Pairs(preferred.folder / "eval")
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in (student, teacher_folder)]
    found = []
    for pair in (rows[index] for index in range(dpo.PROBE)):
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([pair["prompt_ids"] + pair[side]])
            with torch.no_grad():
                p, q = (Categorical(logits=model(ids).logits[0, len(pair["prompt_ids"]) - 1 : -1].double()) for model in models)
            found.append(kl_divergence(p, q))
    assert trainer._kl() == pytest.approx(torch.cat(found).mean().item(), rel=1e-4)


@pytest.mark.parametrize("train", ["mixers", "all_but_mlps"])
def test_dpo_leaves_frozen_weights_as_they_are(tmp_path, preferred, student, train):
    dpo.run(Dpo(**SHORT | {"lr": 3e-2}, steps=2, train=train), student, "", preferred, tmp_path)
    before, after = weights(student), weights(tmp_path)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    mixers = {name for name in before if ".layers.0.self_attn." in name or ".layers.2.self_attn." in name}
    frozen = before.keys() - mixers if train == "mixers" else {name for name in before if ".mlp." in name}
    assert frozen and not moved & frozen and "model.layers.0.self_attn.in_proj.weight" in moved


@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_every_loss_takes_a_step(tmp_path, preferred, student, loss):
    smoothing = 0.1 if loss in ("exo_pair", "robust") else 0.0
    value, gradients = one_step(pair_trainer(tmp_path, student, preferred, loss=loss, label_smoothing=smoothing))
    assert math.isfinite(value) and max(gradient.abs().max() for gradient in gradients.values()) > 0


def test_several_losses_are_weighted(tmp_path, preferred, student):
    """At the start sigmoid is ln 2 and hinge is 1."""
    loss, _ = one_step(pair_trainer(tmp_path, student, preferred, loss=["sigmoid", "hinge"], loss_weights=[2.0, 0.5]))
    assert loss == pytest.approx(2 * math.log(2) + 0.5, abs=1e-4)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"loss": "sigmod"}, "dpo.loss must be of sigmoid, hinge, .* got 'sigmod'"),
        ({"beta": 0.0}, "dpo.beta must be a number > 0"),
        ({"loss": ["sft", "hinge"], "loss_weights": [1.0]}, "dpo.loss_weights must be one number per loss"),
        ({"loss": "exo_pair"}, "label_smoothing must be greater than 0 for exo_pair"),
        ({"lora": Lora(), "rest_lr": 1e-5}, "dpo: lora has one learning rate, got rest_lr=1e-05"),
        ({"lora": Lora(), "join_lr": 1e-2}, "dpo: lora has one learning rate, got join_lr=0.01"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        Dpo(**values)


# both


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_loss_that_is_not_finite(tmp_path, monkeypatch, chats, preferred, student, name):
    run, data, stage = (sft.run, chats, Sft(**SHORT, steps=10)) if name == "sft" else (dpo.run, preferred, Dpo(**SHORT, steps=10))
    kind = sft.SftStage if name == "sft" else dpo.DpoStage
    own = kind.compute_loss
    monkeypatch.setattr(kind, "compute_loss", lambda self, *a, **k: own(self, *a, **k) * (math.nan if self.state.global_step == 5 else 1))
    with pytest.raises(
        ValueError, match="the loss must be finite, got nan at step 6; the last good checkpoint is .*checkpoint-4; lower lr"
    ):
        run(stage, student, "", data, tmp_path)


@pytest.mark.parametrize("name", ["sft", "packed", "dpo", "lora"])
def test_resume_is_bit_equal(tmp_path, monkeypatch, chats, packed, preferred, student, name):
    more = {"lora": Lora(rank=4, dropout=0.1)} if name == "lora" else {}
    data = {"packed": packed, "dpo": preferred}.get(name, chats)
    stage = Dpo(**SHORT, steps=7) if name == "dpo" else Sft(**SHORT, steps=7, **more)
    run, kind = (dpo.run, dpo.DpoStage) if name == "dpo" else (sft.run, sft.SftStage)
    run(stage, student, "", data, tmp_path / "whole")
    own = kind.training_step

    def stopping(self, *args):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return own(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kind, "training_step", stopping)
        run(stage, student, "", data, tmp_path / "parts")
    assert [found.name for found in checkpoints.complete(tmp_path / "parts" / "checkpoints")] == ["checkpoint-4"]
    if name == "dpo":  # what the reference said is not asked again
        monkeypatch.setattr(kind, "compute_ref_log_probs", lambda *_: pytest.fail("asked again"))
    run(stage, student, "", data, tmp_path / "parts")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    lines = [[{**line, "tokens_per_s": 0} for line in read_metrics(tmp_path / part / METRICS)] for part in ("whole", "parts")]
    assert lines[0] == lines[1]


def test_no_decay_on_what_is_no_matrix(tmp_path, chats, student):
    trainer = sft.trainer_of(Sft(**SHORT, steps=1), student, chats, tmp_path)
    decayed = {name.rpartition(".")[2] if "self_attn" in name else name for name in trainer.get_decay_parameter_names(trainer.model)}
    assert not decayed & {"A_log", "D", "dt_bias", "bias", "model.norm.weight"} and "model.layers.0.mlp.up_proj.weight" in decayed


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_special_tokens_stay_the_models(tmp_path, chats, preferred, student, name):
    """A tokenizer without a padding token, as Llama 3's: trainers give it the end token, and write that into the model."""
    bare = shutil.copytree(student, tmp_path / "bare")
    for file in ("config.json", "generation_config.json"):
        (bare / file).write_text(json.dumps(json.loads((bare / file).read_text()) | {"pad_token_id": None}))
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(bare)
    run, data, stage = (sft.run, chats, Sft(**SHORT, steps=1)) if name == "sft" else (dpo.run, preferred, Dpo(**SHORT, steps=1))
    run(stage, str(bare), "", data, tmp_path / "out")
    for kind in (AutoConfig, GenerationConfig):
        before, after = (kind.from_pretrained(folder) for folder in (bare, tmp_path / "out"))
        keys = ("pad_token_id", "bos_token_id", "eos_token_id")
        assert [getattr(after, key) for key in keys] == [getattr(before, key) for key in keys] and after.pad_token_id is None
