"""What sharded training does to the parameters that want fp32: FSDP2's mixed precision computes with them in bf16."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType
from models import ids, rms_error, student
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM

from llamba.data.batches import Rows, collate
from llamba.data.tokens import tokenize
from llamba.models.convert import convert
from llamba.settings import Data, Distill
from llamba.stages import distill
from llamba.training.losses import IGNORE
from llamba.training.trainer import place_teacher, run_as_forward


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


def sharded_worker(rank: int, rendezvous: str, student: str, teacher: str, rows: str, out: str) -> None:
    """Three steps of one of two FSDP2 processes, each with half of every batch; then the weights, consolidated."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    stage = Distill(**STEPS)
    student_model, teacher_hidden = distill._load(stage, student, teacher)
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=False))
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, device=torch.device("cpu"), state=state)
    place_teacher(teacher_hidden, accelerator)
    for module in (*student_model.model.layers, student_model):
        fully_shard(module, mesh=mesh)
    shard = next(student_model.model.layers[0].mlp.parameters()).to_local()
    assert shard.shape[0] * 2 == student_model.config.intermediate_size
    train(stage, student_model, teacher_hidden, Rows(Path(rows)), rank, 2)
    weights = get_model_state_dict(student_model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        student_model.save_pretrained(out, state_dict=weights)
    dist.barrier()
    dist.destroy_process_group()


STEPS = dict(batch=8, micro_batch=4, precision="fp32", lr=5e-3, kl=1.0, ce=0.5, train="all")


def train(stage: Distill, student_model, teacher_hidden, rows: Rows, rank: int, world: int) -> None:
    """Three plain steps; the rows of each are divided among the processes, and gradients are means over processes."""
    optimizer = torch.optim.AdamW(student_model.parameters(), lr=stage.lr)
    for step in range(3):
        every = [rows[8 * step + index] for index in range(8)]
        batch = collate(every[rank::world], 0)
        targets = collate(every, 0)["labels"][:, 1:].ne(IGNORE).sum()
        sums = run_as_forward(student_model, student_model, partial(distill.objective, stage, student_model, teacher_hidden), batch)
        (sums.loss * world / targets).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["mamba2", "auto", "gated_delta", "kda", "mamba3"])
def test_two_fsdp2_processes_train_as_one_and_save_one_model(tmp_path, mixer, teacher_folder, chat_file, tokenizer) -> None:
    student_folder = str(tmp_path / "student")
    convert(str(teacher_folder), mixer=mixer, options={"window": 8} if mixer == "auto" else None).save_pretrained(student_folder)
    tokenize(Data(train=str(chat_file), length=48), tokenizer, "assistant", tmp_path / "data")
    rows = tmp_path / "data" / "train"
    stage = Distill(**STEPS)
    student_model, teacher_hidden = distill._load(stage, student_folder, str(teacher_folder))
    before = {name: value.clone() for name, value in student_model.state_dict().items()}
    train(stage, student_model, teacher_hidden, Rows(rows), 0, 1)
    arguments = (str(tmp_path / "rendezvous"), student_folder, str(teacher_folder), str(rows), str(tmp_path / "out"))
    torch.multiprocessing.spawn(sharded_worker, arguments, nprocs=2)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, value in student_model.state_dict().items():
        assert rms_error(saved[name], value) < 1e-4 and not torch.equal(before[name], saved[name]), name
