"""Models whose weights accelerate keeps on the CPU or on disk, and adapters on what stands beside the projections."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from models import MIXERS, ids, student, teacher
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llamba import speculative
from llamba.models.convert import convert
from llamba.models.draft import make_draft
from llamba.models.offloaded import reading_device
from llamba.training.losses import head_sums

CPU = torch.device("cpu")
EVERY_MIXER = (*MIXERS, "gated_delta", "kda", "toeplitz", "low_rank", "none")
PLACES = {
    "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
    **{f"model.layers.{i}": "disk" if i < 2 else "cpu" for i in range(4)},
}  # fmt: skip


def offloaded(model: Any) -> Any:
    """A copy of which accelerate keeps every weight, for a device that is the CPU too."""
    made = copy.deepcopy(model)
    cpu_offload(made, execution_device=CPU)
    return made


def on_disk(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map=PLACES, offload_folder=folder / "spill").eval()


@torch.no_grad()
@pytest.mark.parametrize("mixer", EVERY_MIXER)
def test_layers_on_cpu_or_disk_give_the_same_logits(mixer: str, tmp_path: Path) -> None:
    model, tokens = student(mixer, dtype=torch.float32), ids(2, 12)
    model.save_pretrained(tmp_path)
    want = model(tokens)
    for place, made in {"cpu": offloaded(model), "disk": on_disk(tmp_path)}.items():
        assert any(weight.is_meta for weight in made.parameters()), place
        got = made(tokens)
        assert torch.equal(got.logits, want.logits), place
        cache = copy.deepcopy(want.past_key_values)
        for more in (ids(2, 1, seed=1), ids(2, 3, seed=2)):  # a step, and a piece
            now, before = (m(more, past_key_values=c).logits for m, c in ((made, got.past_key_values), (model, cache)))
            assert torch.equal(now, before), place


@pytest.mark.parametrize("name", ["qwen3", "phi"])
def test_norms_of_queries_and_keys_are_read_in_their_own_call(name: str) -> None:
    model = student(name=name)
    assert torch.equal(offloaded(model)(ids(2, 9)).logits, model(ids(2, 9)).logits)


@pytest.mark.parametrize("mixer", MIXERS)
def test_generation_plain_and_speculative(mixer: str) -> None:
    model = student(mixer, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    away, tokens, more = offloaded(model), ids(2, 7), {"max_new_tokens": 12}
    want = model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, do_sample=False, **more)
    assert torch.equal(away.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, do_sample=False, **more), want)
    assert reading_device(away) == CPU and away.device.type == "meta"
    for target, draft in ((away, None), (away, model), (model, away), (away, "lookup")):
        assert torch.equal(speculative.generate(target, tokens, draft=draft, **more).sequences, want)
    with pytest.raises(ValueError, match="its weights are offloaded"):
        speculative.generate(away, tokens, engine="graphs", **more)


@pytest.mark.parametrize("name", ["llama-3.2", "qwen3", "phi-qk-norm"])
def test_an_offloaded_teacher_is_converted_as_one_that_is_not(name: str, tmp_path: Path) -> None:
    source = teacher(name, dtype=torch.float32)
    source.save_pretrained(tmp_path)
    want = convert(source).state_dict()
    sources = {"cpu": offloaded(source)} | ({"disk": on_disk(tmp_path)} if name != "phi-qk-norm" else {})
    for place, away in sources.items():
        got = convert(away).state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want), place
        assert any(weight.is_meta for weight in away.parameters()), "the source stays where it was"
    further = convert(offloaded(convert(source)), attention=0.25).state_dict()
    assert all(torch.equal(value, further[key]) for key, value in convert(convert(source), attention=0.25).state_dict().items())
    rows = ids(2, 40)
    fitted = [convert(one, options={"window": 4}, calibrate=rows).state_dict() for one in (source, offloaded(source))]
    assert all(torch.equal(fitted[0][key], fitted[1][key]) for key in fitted[0])
    drafts = [make_draft(one, 2).state_dict() for one in (source, offloaded(source))]
    assert all(torch.equal(drafts[0][key], drafts[1][key]) for key in drafts[0])


def test_a_teacher_without_values_is_refused() -> None:
    with torch.device("meta"):
        empty = type(teacher())(teacher().config)
    with pytest.raises(ValueError, match="teacher: weights with values are needed; q_proj.weight and 3 others have none"):
        convert(empty)
    with pytest.raises(ValueError, match="teacher: weights with values are needed"):
        convert(empty, attention=1.0)


def test_the_loss_reads_the_head_of_an_offloaded_teacher() -> None:
    source, hidden, labels = teacher(), torch.randn(2, 9, 32, dtype=torch.float64), ids(2, 9)
    mine = student().lm_head
    losses = [head_sums(hidden, hidden, mine, m.lm_head, labels, kl=1.0, ce=0.0).loss for m in (source, offloaded(source))]
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks for it
def test_adapters_on_the_convolution_are_refused_and_a_trained_copy_of_it_trains() -> None:
    with pytest.raises(ValueError, match=r"Target module CausalConv\(\) is not supported"):
        get_peft_model(student(dtype=torch.float32), LoraConfig(r=64, target_modules=["conv1d"], task_type="CAUSAL_LM"))
    model: Any = get_peft_model(
        student(dtype=torch.float32), LoraConfig(r=4, target_modules=["in_proj"], modules_to_save=["conv1d"], task_type="CAUSAL_LM")
    )
    before = model(input_ids=ids(2, 12)).logits
    model(input_ids=ids(2, 12), labels=ids(2, 12)).loss.backward()
    copies = {name: weight for name, weight in model.named_parameters() if "conv1d" in name and weight.requires_grad}
    assert len(copies) == 4 and all(weight.grad.abs().max() > 0 for weight in copies.values())
    with torch.no_grad():
        next(iter(copies.values())).add_(0.5)
    assert (model(input_ids=ids(2, 12)).logits - before).abs().max() > 1e-3
