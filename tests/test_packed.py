"""Matrices laid out for decoding, and in 8 bits: as exact as the plain ones, and gone when decoding is over."""

import pytest
import torch
from models import ids, rms_error, student, teacher
from torch import nn

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
    for rows in (1, 2, 7):
        x = torch.randn(1, rows, 64).bfloat16()
        want = x.double() @ (layer.weight.double() * layer.scale.double()[:, None]).T + linear.bias.double()
        assert rms_error(layer(x), want) < 0.01
    model = student().to(torch.bfloat16)
    before = model(ids(1, 8)).logits
    assert packed.to_int8(model) is model and not any(type(module) is nn.Linear for module in model.modules())
    assert rms_error(model(ids(1, 8)).logits, before) < 0.1
    assert len(generate(model, ids(1, 8), max_new_tokens=4, eos_token_id=None).new[0]) == 4
    with pytest.raises(ValueError, match="need a model in bfloat16 on a CPU; got torch.float64 on cpu"):
        packed.to_int8(teacher())
