"""What later stages will need is looked at before the first begins; and where streamed stages go on reading."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamba.data.batches import Rows
from llamba.data.tokens import tokenize
from llamba.running import run
from llamba.settings import Data, Distill, Dpo, Draft, Hidden, Lora, Matrix, PseudoLabel, Recipe, Select, Sft, Stage, Student

SHORT = dict(batch=4, micro_batch=4, steps=1, warmup=0, precision="fp32")


@pytest.fixture(scope="module")
def others(tmp_path_factory, small, tokenizer) -> Path:
    """Models that do not fit the teacher, each in a folder of its own, and rows of pairs."""
    folder = tmp_path_factory.mktemp("others")
    shapes = {"wide": {"hidden_size": 64}, "shallow": {"num_hidden_layers": 2}, "heads": {"num_attention_heads": 2}}
    for name, shape in shapes.items():
        small.llama(len(tokenizer), **shape).save_pretrained(folder / name)
    small.llama(99).save_pretrained(folder / "words")
    (folder / "hollow").mkdir()
    (folder / "hollow" / "config.json").write_bytes((folder / "wide" / "config.json").read_bytes())
    return folder


UNFIT = {
    "a teacher that is not there": (Distill(teacher="./nowhere"), "./nowhere must be a model folder, a run folder"),
    "a teacher on no hub": (Distill(teacher="nobody/nothing-at-all"), "nobody/nothing-at-all must be a model folder or a hub"),
    "a teacher without weights": (Distill(teacher="hollow"), "hollow must be a model folder with weights"),
    "a teacher of other words": (Distill(teacher="words"), "must share a vocabulary, got 300 tokens in .* and 99 in words"),
    "a narrow teacher": (Hidden(teacher="wide"), "stage hidden needs .* the same hidden_size, got 32 in .* and 64 in wide"),
    "a shallow teacher": (Hidden(teacher="shallow"), "the same num_hidden_layers, got 4 in .* and 2 in shallow"),
    "a teacher of fewer heads": (Matrix(teacher="heads"), "stage matrix needs .* the same num_attention_heads, got 4 in .* and 2 in heads"),
    "no one to ask": (PseudoLabel(teacher="./nowhere"), "found no such folder"),
    "a reference of other words": (Dpo(reference="words"), "must share a vocabulary, got 300 tokens in .* and 99 in words"),
    "a draft of layers that nobody has": (Draft(layers=[0, 4]), r"draft.layers must be layers of the teacher, 0 to 3; got \[0, 4\]"),
    "attention that is gone": (Distill(attention=0.75), "keeps layers 2, but they are recurrent in this model already"),
    "a list that is not there": (Distill(attention="layers.json"), "or a JSON file with such a list, got 'layers.json'"),
    "data that are not there": (Sft(data=Data(train="nowhere.jsonl")), "data source nowhere.jsonl does not exist"),
    "held-out data that are not there": (Sft(data=Data(train="rows.jsonl", eval="nowhere.jsonl")), "nowhere.jsonl does not exist"),
    "answers that nobody gives": (Sft(data=Data(train="stage:pseudo_label")), "stage 2 has none before it"),
    "a template that is not there": (Sft(data=Data(train="rows.jsonl", template="llama4")), "data.template must be 'auto', a file or"),
    "a stream without an end": (Sft(data=Data(train="rows.jsonl", streaming=True)), "data.streaming needs sft.tokens or sft.steps"),
    "packed pairs": (Dpo(data=Data(train="rows.jsonl", packing=True)), "do not go with preference pairs"),
    "a batch that does not divide": (Distill(batch=64, micro_batch=3), "distill.batch must be a multiple of .* = 3 x 1, got 64"),
    "a reporter that nobody knows": (Distill(report_to=["wandbb"]), "report_to must name reporters among .*, got 'wandbb'"),
    "bits without the package": (Distill(teacher_bits=4), "teacher_bits=4 needs the package bitsandbytes"),
    "LoRA without the package": (Sft(lora=Lora()), "lora needs peft"),
    "QLoRA without the package": (Dpo(lora=Lora(bits=4)), "needs (peft|bitsandbytes)"),
    "an engine that is not installed": (PseudoLabel(engine="vllm"), "engine='vllm' needs the package vllm"),
}  # fmt: skip


@pytest.mark.parametrize("stage, words", UNFIT.values(), ids=UNFIT)
def test_what_a_later_stage_lacks_is_said_before_the_first_begins(tmp_path, monkeypatch, teacher_folder, others, chat_file, stage, words):
    monkeypatch.chdir(others)
    (others / "rows.jsonl").write_bytes(chat_file.read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("peft", "bitsandbytes", "vllm") else find(name))
    stages: list[Stage] = [Distill(**SHORT), stage]
    recipe = Recipe(str(teacher_folder), Student(), Data(train="rows.jsonl", length=48), stages, str(tmp_path / "run"))
    with pytest.raises(ValueError, match=words):
        run.run(recipe)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.json"]


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reweigh(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Put one tensor in the place of another in a folder's file, or take it out."""
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name) if value is None else tensors.update({name: value})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q_PROJ = "model.layers.3.self_attn.q_proj.weight"
UNFIT_TEACHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (lambda folder: reweigh(folder, Q_PROJ, torch.full((32, 32), float("nan"))), f"finite numbers, got NaN or infinity in {Q_PROJ}"),
    "infinity": (lambda folder: reweigh(folder, Q_PROJ, torch.tensor([[torch.inf] + [0.0] * 31] * 32)), f"infinity in {Q_PROJ}"),
    "a tensor gone": (lambda folder: reweigh(folder, Q_PROJ, None), f"missing {Q_PROJ}"),
    "another shape": (lambda folder: reweigh(folder, Q_PROJ, torch.eye(16)), f"of another shape {Q_PROJ}"),
    "cut off": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "is no whole safetensors file"),
    "another family": (lambda folder: rewrite(folder, model_type="gpt2"), "its model_type must be one of llama"),
    "quantised": (lambda folder: rewrite(folder, quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised .gptq."),
    "without a tokenizer": (lambda folder: [path.unlink() for path in folder.glob("token*")], "needs a tokenizer, and teacher has none"),
}  # fmt: skip


@pytest.mark.parametrize("damage, words", UNFIT_TEACHERS.values(), ids=UNFIT_TEACHERS)
@pytest.mark.parametrize("attention", [0.5, "layers.json"])
def test_an_unfit_teacher_is_said_before_it_is_converted(tmp_path, monkeypatch, teacher_folder, chat_file, damage, words, attention):
    monkeypatch.chdir(tmp_path)
    Path("layers.json").write_text("[1, 3]")
    damage(Path(shutil.copytree(teacher_folder, "teacher")))
    monkeypatch.setattr(run, "_convert", lambda *arguments: pytest.fail("the conversion began"))
    recipe = Recipe("teacher", Student(attention=attention), Data(train=str(chat_file), length=48), [Sft(**SHORT)], "run")
    with pytest.raises(ValueError, match=words):
        run.run(recipe)
    assert [path.name for path in Path("run").iterdir()] == ["recipe.json"]


def test_layers_of_a_list_are_looked_at_before_the_first_stage(tmp_path, monkeypatch, teacher_folder, chat_file):
    monkeypatch.chdir(tmp_path)
    Path("layers.json").write_text("[9]")
    monkeypatch.setattr(run, "_convert", lambda *arguments: pytest.fail("the conversion began"))
    recipe = Recipe(str(teacher_folder), Student(attention="layers.json"), Data(train=str(chat_file)), [Sft(**SHORT)], "run")
    with pytest.raises(ValueError, match="different layer indices from 0 to 3"):
        run.run(recipe)


def test_what_is_left_out_done_or_still_to_be_made_is_not_looked_at(tmp_path, monkeypatch, teacher_folder, chat_file):
    """A skipped stage, a list that a stage of the run will leave, a stage that is done."""
    monkeypatch.chdir(tmp_path)
    later = [Select(keep=0.5, rows=8, micro_batch=4), Distill(**SHORT, attention="run/1-select/layers.json", teacher="run/1-select")]
    left_out = Distill(teacher="./nowhere", skip=True)
    recipe = Recipe(str(teacher_folder), Student(attention=0), Data(train=str(chat_file), length=48), [*later, left_out], "run")
    last = run.run(recipe)
    assert last.name == "2-distill"
    Path("run/1-select/layers.json").unlink()
    assert run.run(recipe) == last


# streams


def rows_of(folder: Path) -> list[list[int]]:
    rows = Rows(folder)
    return [rows[index]["input_ids"].tolist() for index in range(len(rows))]


def test_a_stage_reads_on_where_the_stage_before_it_stopped(tmp_path, teacher_folder, tokenizer, small):
    """Three stages over one stream of 60 rows, the last around its end; a stage on another source in between starts at its start."""
    path = small.write_rows(tmp_path / "stream.jsonl", small.chats(60, seed=3))
    other = small.write_rows(tmp_path / "other.jsonl", small.chats(60, seed=4))
    stream, short = Data(train=str(path), length=48, streaming=True), dict(SHORT, steps=None)
    stages = [
        Hidden(**short, tokens=500, targets="assistant"),
        Distill(**short, tokens=200, data=replace(stream, train=str(other))),
        Distill(**short, tokens=600),
        Distill(**short, tokens=1000),
    ]
    recipe = Recipe(str(teacher_folder), Student(), stream, stages, str(tmp_path / "run"))
    run.run(recipe)
    tokenize(Data(train=str(path), length=48), tokenizer, "assistant", tmp_path / "whole")
    whole, read, at = rows_of(tmp_path / "whole" / "train"), {}, {}
    assert len(whole) == 60
    for folder in (tmp_path / "run" / "data").iterdir():
        count = json.loads((folder / "data.json").read_text())["train"][0]
        found = rows_of(folder / "train")
        assert sum(map(len, found)) == count["tokens"]
        if count["source"] == str(path):
            first = (count["next"] - len(found)) % 60
            read[first] = len(found)
            assert found == [whole[(first + index) % 60] for index in range(len(found))]
    for number, stage in enumerate(stages, 1):
        at[number] = json.loads((tmp_path / "run" / f"{number}-{stage.name}" / "stage.json").read_text())["stopped_at"]
    first, second, third = sorted(read)
    assert first == 0 and second == read[0] == at[1][str(path)] and third == second + read[second] == at[3][str(path)]
    assert third + read[third] > 60 and at[4][str(path)] == (third + read[third]) % 60
    assert list(at[2]) == [str(other)] and len(list((tmp_path / "run" / "data").iterdir())) == 4


def test_a_stream_that_is_used_up_is_read_whole_once(tmp_path, tokenizer, small):
    path = small.write_rows(tmp_path / "in.jsonl", small.chats(20))
    data = Data(train=str(path), length=48, streaming=True)
    for name, starts in (("all", {}), ("turned", {str(path): 7})):
        manifest = tokenize(data, tokenizer, "assistant", tmp_path / name, 10**6, starts)
        assert (manifest["train"][0]["rows"], manifest["train"][0]["next"]) == (20, starts.get(str(path), 0))
    found, turned = (rows_of(tmp_path / name / "train") for name in ("all", "turned"))
    assert turned == found[7:] + found[:7]
