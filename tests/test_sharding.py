"""What sharded training does to the parameters that want fp32: FSDP2's mixed precision computes with them in bf16."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import ids, rms_error, student
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import softplus


@pytest.fixture
def gloo(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fsdp2_rounds_decay_to_bf16_in_compute_and_keeps_fp32_masters(gloo) -> None:
    model = student(attention=0.0, dtype=torch.float32, init="attention")
    with torch.no_grad():
        want = model(ids(1, 40), use_cache=False).logits
    seen = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda mixer, args: seen.append((mixer.A_log.dtype, mixer.dt_bias.dtype)))
        fully_shard(layer, mesh=gloo, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32))
    fully_shard(model, mesh=gloo)
    with torch.no_grad():
        got = model(ids(1, 40), use_cache=False).logits
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert rms_error(got, want) < 0.1  # bf16 everywhere, not only in the decay


def test_what_bf16_does_to_decay_rates() -> None:
    """DeepSpeed's bf16 mode saves, and FSDP2 computes with, A_log and the step bias in bf16: memories move by up to 2% each."""
    a_log = torch.linspace(0, 16.0, 1000).clamp_min(1).log()
    rate_error = (a_log.bfloat16().float().exp() / a_log.exp() - 1).abs().max().item()
    step = torch.logspace(-3.3, -1, 1000)
    bias = step + torch.log(-torch.expm1(-step))
    step_error = (softplus(bias.bfloat16().float()) / step - 1).abs().max().item()
    assert 0.003 < rate_error < 0.009 and 0.01 < step_error < 0.02
