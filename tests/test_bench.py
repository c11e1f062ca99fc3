"""The benches of kernels start on a CPU, print what they compare, and count what they say."""

import json
import subprocess
import sys

import packages
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llamba.bench import cold, mfu, ops, train
from llamba.bench.shapes import shrunk
from llamba.cli import main
from llamba.models.convert import student_config
from llamba.models.published import teacher_config
from llamba.training.learnable import freeze

SMALL = "--device cpu --dtype float32".split()


def _rows(command: str, tmp_path, *more: str) -> list[dict]:
    path = tmp_path / "rows.jsonl"
    main([*command.split(), *(() if "cold" in command else SMALL), "--repeats", "1", "--out", str(path), *more])
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_training_step_against_other_packages(tmp_path, capsys, monkeypatch) -> None:
    """With stand-ins for the packages: every form is compared with PyTorch and mamba-ssm, and what is missing is said."""
    monkeypatch.setitem(train.FORMS, "cpu", ("torch", "mamba_ssm", "fla", "triton"))
    monkeypatch.setattr(train, "P", 16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name, members in packages.STAND_INS.items():
        if name.startswith("mamba_ssm"):
            monkeypatch.setitem(sys.modules, name, packages.stand_in(name, **members))
    rows = {row["impl"]: row for row in _rows("bench train --shrink 64", tmp_path)}
    assert set(rows) == {"torch", "mamba_ssm", "triton"}
    assert rows["triton"]["speed_of_mamba_ssm"] == pytest.approx(rows["mamba_ssm"]["ms"] / rows["triton"]["ms"])
    assert rows["triton"]["speed_of_torch"] == pytest.approx(rows["torch"]["ms"] / rows["triton"]["ms"])
    printed = capsys.readouterr().out
    assert "fla        not installed" in printed and "speed of mamba_ssm" in printed and "copy 0 GB/s" not in printed
    assert train.compared({"ms": 1.0, "peak_mib": 3.0}, {"torch": {"ms": 4.0, "peak_mib": 6.0}}) == {
        "speed_of_torch": 4.0, "memory_of_torch": 0.5,
    }  # fmt: skip


def test_a_distillation_step(tmp_path, capsys) -> None:
    (row,) = _rows("bench mfu --shrink 32", tmp_path)
    assert row["mfu"] == pytest.approx(row["tflop_s"] / row["matmul_tflop_s"]) and row["tflop_s"] == pytest.approx(
        1e3 * row["tflop"] / row["ms"]
    )
    assert "of the matrix product's" in capsys.readouterr().out


def test_what_is_counted_is_what_a_step_multiplies() -> None:
    """Against PyTorch's counter, which sees every product of a matrix and the tokens; what is between tokens goes by formula."""
    shape, tokens = shrunk(teacher_config(mfu.SHAPE), 32), 64
    teacher = mfu._made(shape, torch.float32, "cpu").requires_grad_(False).eval()
    student = mfu._made(student_config(shape, mfu.MIXER, mfu.ATTENTION), torch.float32, "cpu").train()
    freeze(student, "mixers")
    with FlopCounterMode(display=False) as seen:
        mfu._step(student, teacher, torch.randint(shape.vocab_size, (1, tokens)), torch.float32)()
    products = sum(seen.get_flop_counts()["Global"].get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    parts, heads, width = mfu.counted(student, teacher, tokens), shape.num_attention_heads, shape.head_dim
    attention, ssd = 2 * tokens * tokens * heads * width, 4 * tokens * heads * width * width  # of one layer, forward
    assert shape.num_hidden_layers == 2 and sum(parts.values()) == products + 2 * attention + 3 * (attention + ssd)
    mixer = student.model.layers[0].self_attn
    assert parts["weight_gradients"] == 2 * tokens * (mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel())


def test_mixers_against_those_of_transformers(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(ops, "_peak_apart", lambda *_: 1.0)  # each takes a process of its own, which imports everything anew
    monkeypatch.setattr(ops, "THREADS", torch.get_num_threads())
    rows = _rows("bench ops --shrink 64 --mixers mamba2 gated_delta", tmp_path)
    assert [(row["mixer"], row["work"]) for row in rows] == [(kind, what) for kind in ("mamba2", "gated_delta") for what in ops.WORK]
    assert all(row["theirs_in"] == "torch" and row["speedup"] > 0 for row in rows)
    assert "theirs: transformers' mixers in torch" in capsys.readouterr().out
    (tmp_path / "rows.jsonl").unlink()
    own = _rows("bench ops --shrink 64 --own", tmp_path)
    assert [(row["work"], row["mixer"]) for row in own] == [(w, k) for w in ops.WORK for k in ("auto", "gated_delta", "kda", "mamba3")]
    assert all(row["times_of_mamba2"] == row["ours_s"] / row["mamba2_s"] for row in own)
    cuda = ops.work_on("cuda", "auto", 1)
    assert (cuda.dtype, cuda.tokens, cuda.inner, cuda.groups) == (torch.bfloat16, 4096, 4096, 8)


@pytest.mark.slow
def test_a_cold_start_loads_no_package_that_a_bare_script_does_not(teacher_folder, tmp_path, capsys) -> None:
    """All three print the same token, and what costs the command its time is its own code, not packages that it imports too early."""
    (row,) = _rows(f"bench cold --model {teacher_folder}", tmp_path)
    assert row["llamba generate"]["printed"] and len({row[name]["printed"] for name in cold.processes("x")}) == 1
    assert row["llamba generate"]["of_transformers"] == row["llamba generate"]["cpu_s"] / row["transformers"]["cpu_s"]
    tell = "\nprint(*sorted({name.partition('.')[0] for name in sys.modules}))"
    bare, ours = (_packages(code + tell, str(teacher_folder)) for code in (cold.BARE, _COMMAND))
    assert ours - bare <= {"llamba", "shlex", "fcntl"}


_COMMAND = (
    f"import sys\nfrom llamba.cli import main\nmain(['generate', sys.argv[1], {cold.TEXT!r}, '--max-new-tokens', '1', '--device', 'cpu'])"
)


def _packages(code: str, model: str) -> set[str]:
    """The packages that a process has loaded, which prints them last."""
    done = subprocess.run([sys.executable, "-c", code, model, cold.TEXT], capture_output=True, text=True, check=True)
    return set(done.stdout.strip().splitlines()[-1].split())
