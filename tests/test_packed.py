"""Matrices laid out for decoding, and in 8 bits: as exact as the plain ones, and gone when decoding is over."""

import pytest
import torch
from models import SHAPE, STUDENTS, ids, rms_error, student, teacher
from torch import nn
from transformers import PhiConfig, PhiForCausalLM

from llamba.speculative import generate, packed


def pair(name: str = "llama"):
    """A student in bf16, and its exact twin in fp64 with the same, rounded, weights."""
    low = student(name=name).to(torch.bfloat16)
    exact = student(name=name)
    exact.load_state_dict({key: value.double() for key, value in low.state_dict().items()})
    return low, exact.double()


@pytest.mark.parametrize("name", ["llama", "llama-biased", "phi", "qwen3"])
def test_as_exact_as_plain_matrices(name):
    low, exact = pair(name)
    tokens = ids(1, 12)
    with torch.inference_mode():
        want, plain = exact(tokens).logits, low(tokens).logits
        with packed.packed(low):
            changed = [module for module in low.modules() if "forward" in module.__dict__]
            got = low(tokens).logits
    assert len(changed) == sum(type(module) is nn.Linear for module in low.modules())
    assert rms_error(got, want) < 1.2 * rms_error(plain, want)
    assert not any("forward" in module.__dict__ for module in low.modules())


def test_long_calls_other_numbers_and_new_weights():
    """More tokens than pay go the plain way; fp32 does so always; weights that have changed are laid out anew."""
    low, other = student().to(torch.bfloat16), teacher(dtype=torch.float32)
    linear = low.model.layers[0].mlp.up_proj
    with torch.inference_mode(), packed.packed(low, other, None, "lookup"):
        assert not any("forward" in module.__dict__ for module in other.modules())
        long = torch.randn(1, packed.MOST + 1, linear.in_features, dtype=torch.bfloat16)
        assert torch.equal(linear(long), nn.functional.linear(long, linear.weight))
    x = torch.randn(1, linear.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.mul_(2)
    with torch.inference_mode(), packed.packed(low):
        torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight), rtol=2e-2, atol=2e-2)


def test_generate_is_the_same_text():
    """Greedy tokens with laid-out matrices, speculative ones as well: the model's own, up to ties of bf16 logits."""
    low = student().to(torch.bfloat16)
    prompt = ids(1, 9)
    plain = generate(low, prompt, max_new_tokens=12, eos_token_id=None).new[0]
    drafted = generate(low, prompt, draft="lookup", max_new_tokens=12, eos_token_id=None).new[0]
    sequence = torch.tensor([prompt[0].tolist() + plain])
    with torch.inference_mode():
        logits = low.float()(sequence).logits[0, 8:-1]
    chosen = logits.gather(1, torch.tensor(plain)[:, None])[:, 0]
    assert bool((logits.amax(-1) - chosen < 0.05 * logits.std()).all())
    assert len(drafted) == 12


def test_8_bits():
    """Weights are within half a step of a row's scale, and the layer is the product with just these weights, for few and many tokens."""
    weight = torch.randn(24, 64).bfloat16()
    low, scale = packed.quantised(weight)
    assert low.dtype == torch.int8 and low.abs().amax(1).ge(126).all()
    assert (
        (low.float() * scale.float()[:, None] - weight.float()).abs() <= 0.51 * scale.float()[:, None] + 0.005 * weight.float().abs()
    ).all()
    linear = nn.Linear(64, 24, dtype=torch.bfloat16)
    layer = packed.Int8Linear(linear)
    for rows in (1, 2, packed.FEW, packed.FEW + 1, 40):
        x = torch.randn(1, rows, 64).bfloat16()
        want = x.double() @ (layer.weight.double() * layer.scale.double()[:, None]).T + linear.bias.double()
        assert rms_error(layer(x), want) < 0.01
        assert torch.isfinite(layer(x.expand(2, -1, -1).transpose(0, 1)[..., :])).all()  # whatever its strides


@pytest.mark.parametrize(
    "mixer", [*STUDENTS, pytest.param("gated_delta", marks=pytest.mark.slow), pytest.param("mamba3", marks=pytest.mark.slow)]
)
def test_a_model_in_8_bits_is_the_model_of_its_dequantised_weights(mixer):
    """Whole passes and single steps, against the same model in fp64 with the weights that int8 and scales stand for."""
    low = student(mixer).to(torch.bfloat16)
    exact = student(mixer, dtype=torch.float32)
    exact.load_state_dict({key: value.float() for key, value in low.state_dict().items()})
    assert packed.to_int8(low) is low
    replaced = {name: module for name, module in low.named_modules() if isinstance(module, packed.Int8Linear)}
    for name, module in replaced.items():
        exact.get_submodule(name).weight = nn.Parameter(module.weight.float() * module.scale.float()[:, None])
    plain = {name for name, module in low.named_modules() if type(module) is nn.Linear}
    assert replaced and all(low.get_submodule(name).in_features % packed.WIDE for name in plain)
    exact, tokens = exact.double(), ids(1, 20)
    with torch.inference_mode():
        want = exact(tokens).logits
        assert rms_error(low(tokens).logits, want) < 0.06
        read = low(tokens[:, :17], use_cache=True)
        steps = [low(tokens[:, i : i + 1], past_key_values=read.past_key_values).logits for i in range(17, 20)]
    assert rms_error(torch.cat(steps, 1), want[:, 17:]) < 0.06
    assert len(generate(low, ids(1, 8), max_new_tokens=4, eos_token_id=None).new[0]) == 4


def test_what_does_not_go_into_8_bits():
    """Narrow matrices stay as they are: torch's kernel reads 16 inputs at a time, beyond the end of shorter rows."""
    model = nn.Sequential(nn.Linear(40, 24), nn.Linear(48, 24)).bfloat16()
    assert [packed._fits(layer) for layer in model] == [False, True]
    with pytest.raises(ValueError, match="need a model in bfloat16 on a CPU, all of it; got torch.float64 on cpu"):
        packed.to_int8(teacher())
    narrow = PhiForCausalLM(PhiConfig(**{**SHAPE, "hidden_size": 24, "intermediate_size": 40})).bfloat16()
    with pytest.raises(ValueError, match="multiple of 16 inputs, and PhiForCausalLM has none: it is quantised already, or too narrow"):
        packed.to_int8(narrow)
    with pytest.raises(ValueError, match="has none: it is quantised already"):
        packed.to_int8(packed.to_int8(teacher(dtype=torch.bfloat16)))
