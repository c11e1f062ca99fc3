"""Selection: scores against plainly built hybrids, what it leaves behind, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from models import ids, teacher
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from llamba.cli import main
from llamba.models.convert import convert
from llamba.models.documents import attend_by_document
from llamba.running import run
from llamba.running.plan import plan
from llamba.settings import Data, Recipe, Select, Student, layers_of
from llamba.training.frozen import lower_whole
from llamba.training.layer_ranking import Ranking, _Scorer, counted, divergence, rank, restore, save, swapped, table

LAYERS = 4


def reference(name: str = "llama"):
    return convert(teacher(name), attention=1.0)


def converted(name: str = "llama", mixer: str = "mamba2"):
    """Mixers everywhere, with random parameters of their own."""
    return convert(teacher(name), mixer=mixer, attention=0, init="paper")


def batches() -> list[dict[str, Tensor]]:
    """Two batches, one of them padded, with prompts that are no targets."""
    made = []
    for seed, lengths in ((1, (12, 12)), (2, (9, 14))):
        tokens = ids(2, max(lengths), seed=seed)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        labels = torch.where(mask & (torch.arange(max(lengths)) > 3), tokens, -100)
        made.append({"input_ids": tokens, "attention_mask": mask.long(), "labels": labels})
    return made


@torch.no_grad()
def plain_kl(student, teacher_model) -> float:
    """Mean KL(teacher_model || student) per target token, from whole logits, one unpadded row at a time."""
    total, count = 0.0, 0
    for batch in batches():
        for row in range(2):
            length = int(batch["attention_mask"][row].sum())
            tokens, labels = batch["input_ids"][row : row + 1, :length], batch["labels"][row, 1:length]
            p, q = (F.log_softmax(model(tokens).logits[0, :-1].double(), -1) for model in (teacher_model, student))
            total += ((p.exp() * (p - q)).sum(-1) * (labels >= 0)).sum().item()
            count += int((labels >= 0).sum())
    return total / count


def with_attention_in(layers: list[int], student, name: str):
    """The student's mixers in a hybrid that was converted with attention in `layers` from the start."""
    made = convert(teacher(name), attention=layers, mixer=student.config.mixer["kind"])
    made.load_state_dict({key: value for key, value in student.state_dict().items() if key in made.state_dict()}, strict=False)
    for layer in layers:
        made.model.layers[layer].self_attn.load_state_dict(teacher(name).model.layers[layer].self_attn.state_dict())
    return made


@pytest.mark.parametrize("name, mixer", [("llama", "mamba2"), ("mistral", "mamba1"), ("phi", "discrete_mamba2")])
def test_scores_are_those_of_hybrids_built_plainly(name, mixer):
    teacher_model, student = reference(name), converted(name, mixer)
    restored, swapped = rank(teacher_model, student, batches(), "restore"), rank(teacher_model, student, batches(), "swap")
    assert restored.targets == swapped.targets == int(sum((batch["labels"] >= 0).sum() for batch in batches()))
    start = plain_kl(student, teacher(name))
    assert restored.start == pytest.approx(start, rel=1e-6) and swapped.start == pytest.approx(0, abs=1e-9)
    for layer in range(LAYERS):
        one = plain_kl(with_attention_in([layer], student, name), teacher(name))
        others = plain_kl(with_attention_in([i for i in range(LAYERS) if i != layer], student, name), teacher(name))
        assert restored.scores[layer] == pytest.approx(start - one, rel=1e-5, abs=1e-8)
        assert swapped.scores[layer] == pytest.approx(others, rel=1e-5)


def test_some_targets_of_each_row():
    """Evenly spaced, all where they are few, and what is compared at them is what `rank` without a limit says of a row cut to them."""
    labels = torch.full((2, 21), -100)
    labels[0, 1:] = 5
    labels[1, 4:7] = 5
    every = counted(labels, None)
    assert every.sum(1).tolist() == [20, 3] and torch.equal(counted(labels, 30), every)
    some = counted(labels, 5)
    assert some.sum(1).tolist() == [5, 3] and some[0].nonzero().flatten().diff().unique().tolist() == [4]
    teacher_model, student = reference(), converted()
    scorer = _Scorer(student, teacher_model, teacher_model, 3)
    total = sum(scorer.start(batch) for batch in batches())
    found = rank(teacher_model, student, batches(), per_row=3)
    assert found.targets == 12 and found.start == pytest.approx(total / 12)
    assert divergence(teacher_model, student, batches(), [], per_row=3) == pytest.approx(found.start)


def test_products_in_bf16_rank_alike():
    """What a CPU computes with: scores within a hundredth of the start of those in fp64, and the same order where they are apart."""
    teacher_model, student = reference(), converted()
    exact = rank(teacher_model, student, batches())
    low = [model.float() for model in (reference(), converted())]
    for model in low:
        lower_whole(model)
        attend_by_document(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = rank(*low, batches())
    assert found.start == pytest.approx(exact.start, rel=0.02)
    assert found.scores == pytest.approx(exact.scores, abs=0.02 * exact.start)


class Heads(nn.Module):
    """Attention with one head's part of its projection zeroed, and the mixer with all parts but that one zeroed."""

    def __init__(self, attention: nn.Module, mixer: nn.Module, head: int, out: str, width: int):
        super().__init__()
        self.attention, self.mixer = attention, mixer
        part = slice(head * width, (head + 1) * width)
        kept = torch.zeros_like(mixer.out_proj.weight)
        kept[:, part] = 1
        with torch.no_grad():
            attention.get_submodule(out).weight.mul_(1 - kept)
            mixer.out_proj.weight.mul_(kept)
            if mixer.out_proj.bias is not None:
                mixer.out_proj.bias.zero_()

    def forward(self, hidden: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs) -> tuple[Tensor, None]:
        hidden = kwargs.pop("hidden_states", hidden)
        return self.attention(hidden, attention_mask=attention_mask, **kwargs)[0] + self.mixer(hidden)[0], None


@pytest.mark.parametrize("name, out", [("llama", "o_proj"), ("phi", "dense")])
def test_head_scores_are_those_of_layers_with_one_head_exchanged(name, out):
    """swap: all heads of one layer but one from attention. The whole model is built from separate copies of the weights."""
    found = rank(reference(name), converted(name), batches(), "swap", heads=True)
    assert found.heads is not None
    for layer, head in ((0, 1), (3, 2)):
        mixed, mixer = reference(name), converted(name).model.layers[layer].self_attn
        place = mixed.model.layers[layer]
        place.self_attn = Heads(place.self_attn, mixer, head, out, width=8)
        assert found.heads[layer][head] == pytest.approx(plain_kl(mixed, teacher(name)), rel=1e-5)
    assert [len(row) for row in found.heads] == [4] * LAYERS
    best = found.head_order()[0]
    assert best["score"] == max(score for row in found.heads for score in row) == found.heads[best["layer"]][best["head"]]


def test_restoring_heads_starts_from_the_student():
    """All heads of a layer restored one by one do not add up, but a head whose both sides are silent changes nothing."""
    teacher_model, student = reference(), converted()
    with torch.no_grad():
        teacher_model.model.layers[1].self_attn.o_proj.weight[:, 8:16] = 0
        student.model.layers[1].self_attn.out_proj.weight[:, 8:16] = 0
    found = rank(teacher_model, student, batches(), "restore", heads=True)
    assert found.heads is not None
    assert found.heads[1][1] == pytest.approx(0, abs=1e-9) and abs(found.heads[1][0]) > 1e-4


def test_the_layer_that_matters_is_found():
    """Attention that writes nothing is not missed; the one layer whose attention is loud must come first."""
    source = teacher()
    with torch.no_grad():
        for layer in source.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
        source.model.layers[2].self_attn.o_proj.weight.mul_(300)
    teacher_model, student = convert(source, attention=1.0), convert(source, attention=0, init="random")
    with torch.no_grad():
        for layer in student.model.layers:
            layer.self_attn.out_proj.weight.mul_(0.01)
    for method in ("restore", "swap"):
        found = rank(teacher_model, student, batches(), method)
        assert found.order()[0] == 2 and found.kept(0.25) == [2], method
        assert found.kept(0) == [] and len(found.kept(0.5)) == 2


def test_models_are_left_as_they_were_and_restoring_is_for_good():
    teacher_model, student = reference(), converted()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    kinds = list(student.config.layer_types), list(teacher_model.config.layer_types)
    rank(teacher_model, student, batches(), "restore", heads=True)
    rank(teacher_model, student, batches(), "swap", heads=True)
    after = student.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert (student.config.layer_types, teacher_model.config.layer_types) == kinds
    measured = divergence(teacher_model, student, batches(), [1, 3])
    restore(student, teacher_model, [1, 3])
    assert student.config.layer_types == ["linear_attention", "full_attention"] * 2
    assert plain_kl(student, teacher()) == pytest.approx(measured, rel=1e-6)


def test_lent_layers_come_back_after_an_error():
    teacher_model, student = reference(), converted()
    own = student.model.layers[0].self_attn
    with pytest.raises(RuntimeError), swapped(student, teacher_model, [0]):
        assert student.model.layers[0].self_attn is teacher_model.model.layers[0].self_attn
        raise RuntimeError
    assert student.model.layers[0].self_attn is own and student.config.layer_types[0] == "linear_attention"


def test_refuses():
    teacher_model = reference()
    with pytest.raises(ValueError, match=r"every layer converted \(student.attention=0\); attention is left in \[1, 3\]"):
        rank(teacher_model, convert(teacher(), attention=0.5), batches())
    with pytest.raises(ValueError, match="needs the teacher that the student was made of"):
        rank(teacher_model, converted("mistral"), batches())
    silent = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches()]
    with pytest.raises(ValueError, match="rows with target tokens"):
        rank(teacher_model, converted(), silent)


def test_the_file_is_a_value_of_attention(tmp_path):
    found = Ranking("restore", 2.0, [0.1, 0.7, 0.3, 0.6], [[0.1, 0.2]] * 4, 100)
    save(found, found.kept(0.5), tmp_path / "new" / "layers.json", {"teacher": "org/model"})
    assert layers_of(str(tmp_path / "new" / "layers.json")) == [1, 3]
    written = json.loads((tmp_path / "new" / "layers.json").read_text())
    assert written["order"] == [1, 3, 2, 0] and written["teacher"] == "org/model" and len(written["heads"]) == 8
    assert (tmp_path / "new" / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert table(found, [1, 3]).splitlines()[1].split() == ["1", "1", "0.7", "keeps", "attention"]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_stage_gives_the_teachers_attention_back(tmp_path, teacher_folder, chat_file):
    """Half of the layers: the teacher's own attention, bit for bit; the others: what the student had."""
    stages = [Select(keep=0.5, rows=8, micro_batch=4)]
    data, student = Data(train=str(chat_file), length=48), Student(mixer="mamba2", attention=0)
    recipe = Recipe(str(teacher_folder), student, data, stages, str(tmp_path / "run"))
    last = run.run(recipe)
    found = json.loads((last / "layers.json").read_text())
    assert last.name == "1-select" and len(found["layers"]) == 2 and len(found["scores"]) == LAYERS
    made, old, source = weights_of(last), weights_of(last.parent / "0-convert"), weights_of(teacher_folder)
    for name, value in made.items():
        restored = any(f".layers.{layer}.self_attn." in name for layer in found["layers"])
        assert torch.equal(value, (source if restored else old)[name].float()), name
    model = AutoModelForCausalLM.from_pretrained(last)
    kinds = ["full_attention" if layer in found["layers"] else "linear_attention" for layer in range(LAYERS)]
    assert model.config.layer_types == kinds
    assert found["kl_with_attention_in"]["selected"] < found["kl_with_attention_in"]["none"] == found["start"]
    assert f"attention back in 2 of {LAYERS} layers" in str(plan(recipe))


def test_the_command(tmp_path, teacher_folder, chat_file, capsys):
    """Without a student: a fresh conversion. The file goes straight into a conversion."""
    out = tmp_path / "layers.json"
    common = [str(teacher_folder), "--data", str(chat_file), "--length", "48", "--rows", "4", "--out", str(out)]
    main(["select", *common, "--keep", "0.25", "--method", "swap", "--heads", "--mixer", "mamba1"])
    found = json.loads(out.read_text())
    assert found["method"] == "swap" and len(found["layers"]) == 1 and len(found["heads"]) == 16
    printed = capsys.readouterr().out
    best = found["heads"][0]
    assert f"heads that score highest, as layer.head: {best['layer']}.{best['head']} (" in printed
    assert f"student.attention={out}" in printed and out.with_suffix(".png").exists()
    half = convert(str(teacher_folder), attention=layers_of(str(out)))
    assert half.conversion.kept == found["layers"]
    with pytest.raises(SystemExit):
        main(["select", *common, "--student", str(teacher_folder)])
    assert "needs a student with every layer converted" in capsys.readouterr().err


def test_convert_selects(tmp_path, teacher_folder, chat_file, capsys):
    main(["convert", str(teacher_folder), str(tmp_path / "uniform"), "--mixer", "mamba2"])
    assert "layer 0 too" in capsys.readouterr().err
    main(["convert", str(teacher_folder), str(tmp_path / "s"), "--mixer", "mamba2", "--select", str(chat_file), "--rows", "4"])
    said, found = capsys.readouterr(), json.loads((tmp_path / "s.layers.json").read_text())
    kinds = AutoModelForCausalLM.from_pretrained(tmp_path / "s").config.layer_types
    assert "note" not in said.err and [index for index, kind in enumerate(kinds) if kind == "full_attention"] == found["layers"]
    assert found["method"] == "swap" and found["keep"] == 0.5 and len(found["scores"]) == LAYERS
    with pytest.raises(SystemExit):
        main(["convert", str(teacher_folder), str(tmp_path / "t"), "--select", str(chat_file), "--attention", "[1]"])
    assert "--attention as a fraction" in capsys.readouterr().err
