"""What does not learn costs less and changes nothing: bf16 once, one memory for both models, layers run once, attention by documents."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from llamba.data.batches import Ordered, collate
from llamba.kernels.attention import causal_attention
from llamba.models.convert import convert
from llamba.models.documents import BY_DOCUMENT, attend_by_document, by_document, documents_of
from llamba.settings import Distill
from llamba.stages import distill
from llamba.training import frozen
from llamba.training.learnable import freeze
from llamba.training.trainer import DistillTrainer, training_arguments

from .models import TEACHERS, ids, rms_error, teacher


def masks(lengths: list[list[int]]) -> torch.Tensor:
    """Causal within documents, [B, 1, T, T]."""
    return torch.stack([torch.block_diag(*[torch.ones(n, n).tril() for n in row]).bool() for row in lengths])[:, None]


@pytest.mark.parametrize("lengths", [[[300], [300]], [[1, 130, 169], [128, 172]]])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_causal_attention(lengths, groups):
    """fp64 to rounding; bf16 no worse than PyTorch's own, outputs and gradients."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = [draw(2, heads, 300, 16) * strength for heads, strength in ((4, 2), (groups, 2), (groups, 1))]
    up = draw(2, 300, 4, 16)

    def run(dtype: torch.dtype, ours: bool) -> list[torch.Tensor]:
        q, k, v = (tensor.to(dtype).clone().requires_grad_() for tensor in inputs)
        if ours:
            y = causal_attention(q, k, v, 0.25, lengths)
        else:
            wide = (tensor.repeat_interleave(4 // groups, 1) for tensor in (k, v))
            y = F.scaled_dot_product_attention(q, *wide, masks(lengths), scale=0.25).transpose(1, 2)
        y.backward(up.to(dtype))
        return [y.detach(), *(tensor.grad for tensor in (q, k, v))]

    want = run(torch.float64, ours=False)
    pairs = list(zip(run(torch.float64, True), run(torch.bfloat16, True), run(torch.bfloat16, False), want, strict=True))
    assert all(rms_error(wide, exact) < 1e-13 for wide, _, _, exact in pairs)
    assert all(rms_error(low, exact) < 1.5 * rms_error(theirs, exact) for _, low, theirs, exact in pairs)
    with pytest.raises(ValueError, match="documents of T tokens together"):
        causal_attention(*inputs, 0.25, [[299], [300]])


@pytest.mark.parametrize("name", TEACHERS)
def test_by_document(name):
    """Packed and padded rows, in every family: what the family's own attention gives with its mask."""
    model = teacher(name)
    packed = {"input_ids": ids(2, 24), "position_ids": torch.stack([torch.cat([torch.arange(9), torch.arange(15)]), torch.arange(24)])}
    padded = {"input_ids": ids(2, 24), "attention_mask": (torch.arange(24) < torch.tensor([[24], [17]])).long()}
    assert documents_of(packed["position_ids"], None, packed["input_ids"].shape).lengths == [[9, 15], [24]]
    want = [model.base_model(**batch, use_cache=False).last_hidden_state for batch in (packed, padded)]
    assert by_document(model, packed) == {}
    attend_by_document(model)
    assert model.config._attn_implementation == BY_DOCUMENT and by_document(model, padded)["documents"].lengths == [[24], [17, 7]]
    got = [model.base_model(**batch, **by_document(model, batch), use_cache=False).last_hidden_state for batch in (packed, padded)]
    torch.testing.assert_close(got[0], want[0], rtol=1e-9, atol=1e-9)
    real = padded["attention_mask"].bool()
    torch.testing.assert_close(got[1][real], want[1][real], rtol=1e-9, atol=1e-9)


def trainer_of(stage: Distill, data, student: str, teacher_model: str, out: Path) -> DistillTrainer:
    rows = data.rows("train")
    ordered = Ordered(rows, stage.batch, data.seed, epochs=1, steps=stage.steps, tokens=None)
    student_model, teacher_ = distill._load(stage, student, teacher_model)
    return DistillTrainer(
        student_model, teacher_, partial(distill.objective, stage), training_arguments(stage, 1, 0, out / "c"), ordered, out / "m"
    )


@pytest.fixture(scope="module")
def upper(tmp_path_factory, teacher_folder) -> str:
    """A student with mixers in layers 2 and 3: the first two are the teacher's."""
    folder = tmp_path_factory.mktemp("upper")
    convert(str(teacher_folder), attention=[0, 1]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_numbers_for_less(tmp_path, data, upper, teacher_folder, precision):
    """Loss and gradients are those of whole fp32 weights under autocast, bit for bit but for attention's own rounding; layers run once."""
    stage = Distill(batch=4, micro_batch=4, steps=1, precision=precision, kl=1.0)
    batch = collate([data.rows("train")[row] for row in range(4)], 0)
    student_model, teacher_model = distill._load(stage, upper, str(teacher_folder))
    trainer = trainer_of(stage, data, upper, str(teacher_folder), tmp_path)
    assert frozen.shared_layers(trainer.student, trainer.teacher) == 2 and frozen.shared_layers(student_model, teacher_model) == 0
    for model in (trainer.student, trainer.teacher):
        model.set_attn_implementation("sdpa")
    calls = []
    trainer.student.base_model.layers[1].register_forward_hook(lambda *_: calls.append("student"))
    trainer.teacher.base_model.layers[1].register_forward_hook(lambda *_: calls.append("teacher"))
    results = []
    for student, against in ((student_model, teacher_model), (trainer.student, trainer.teacher)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = distill.objective(stage, student, against, batch).loss
        loss.backward()
        results.append([loss.detach(), *(weight.grad for weight in student.parameters() if weight.grad is not None)])
    assert calls == ["teacher"] and len(results[0]) > 5
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_memory_is_one_and_folders_are_whole(tmp_path, data, upper, teacher_folder):
    trainer = trainer_of(Distill(batch=4, micro_batch=4, steps=1), data, upper, str(teacher_folder), tmp_path)
    student, teacher_model = trainer.student, trainer.teacher
    before = load_file(Path(upper) / "model.safetensors")
    low = {name for name, weight in student.named_parameters() if weight.dtype == torch.bfloat16}
    assert "model.layers.3.mlp.up_proj.weight" in low and not any(".3.self_attn." in name or "norm" in name for name in low)
    theirs = dict(teacher_model.named_parameters())
    own = {name: weight for name, weight in student.named_parameters() if not weight.requires_grad}
    assert own and all(weight.data_ptr() == theirs[name].data_ptr() for name, weight in own.items())
    trainer._save(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in before)
    assert student.get_parameter("model.layers.3.mlp.up_proj.weight").dtype == torch.bfloat16


def test_what_the_folder_does_not_have_stays(tmp_path, upper):
    student = AutoModelForCausalLM.from_pretrained(upper, dtype=torch.float32)
    freeze(student, "mixers")
    student.model.layers[2].mlp.up_proj.weight.data += 1
    lowered = frozen.Lowered(student, Path(upper))
    assert "model.layers.2.mlp.up_proj.weight" not in lowered.weights and student.model.layers[2].mlp.up_proj.weight.dtype == torch.float32
    assert student.model.layers[2].mlp.down_proj.weight.dtype == torch.bfloat16
    assert not frozen.Lowered(student, tmp_path / "nowhere").weights
    freeze(student, "all")
    assert not frozen.Lowered(student, Path(upper)).weights
