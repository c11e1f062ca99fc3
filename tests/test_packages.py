"""Forms that run in other packages: their arguments against stand-ins with the same signatures, and the packages themselves where given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import packages
import pytest
import torch

from llamba.kernels.conv1d import causal_conv1d
from llamba.kernels.selective_scan import selective_scan
from llamba.kernels.ssd import ssd

CASES = {name: rest for name, *rest in packages.cases()}


@pytest.fixture
def installed(monkeypatch) -> None:
    """Stand-ins for the packages, and the permission to run them on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name, members in packages.STAND_INS.items():
        monkeypatch.setitem(sys.modules, name, packages.stand_in(name, **members))


@pytest.mark.parametrize("case", CASES)
def test_a_package_gets_what_it_documents_and_gives_what_the_sequential_form_gives(case: str, installed) -> None:
    for name, error in packages.errors(*CASES[case]).items():
        assert error <= 2e-6, f"{name}: relative RMS error {error:.1e}"


def test_a_package_in_16_bit_gets_one_number_format(installed) -> None:
    for op, form, inputs, options in CASES.values():
        with torch.no_grad():
            y, _ = op(**{name: t.bfloat16() if name in ("x", "b", "c") else t for name, t in inputs.items()}, impl=form, **options)
        assert y.dtype == torch.bfloat16


def test_what_a_package_cannot_take_is_a_sentence(installed) -> None:
    _, _, inputs, options = CASES["ssd fla discrete"]
    with pytest.raises(ValueError, match=r"ssd cannot run in mamba_ssm: mamba-ssm takes one rate a head, a \[H\]"):
        ssd(**inputs, **options, impl="mamba_ssm")
    with pytest.raises(ValueError, match="ssd cannot run in fla: its kernels take fp32 and 16-bit tensors, got fp64"):
        ssd(**{name: t.double() for name, t in inputs.items()}, impl="fla")
    with pytest.raises(ValueError, match="ssd cannot run in fla: in 16 bit it takes even P and N, got P = 5 and N = 32"):
        ssd(**inputs | {"x": inputs["x"][..., :5].bfloat16()}, impl="fla")
    with pytest.raises(ValueError, match=r"a \[H\] is a rate per unit of dt, so it needs dt; got None"):
        ssd(**inputs | {"a": -torch.ones(4)})
    scan = {name: t for name, t in CASES["selective_scan"][2].items()}
    with pytest.raises(ValueError, match="selective_scan cannot run in mamba_ssm: its scan begins without a state"):
        selective_scan(**scan, state=torch.zeros(2, 12, 3), impl="mamba_ssm")
    with pytest.raises(ValueError, match="knows no documents"):
        selective_scan(**scan, seq_idx=torch.zeros(2, 20, dtype=torch.long), impl="mamba_ssm")
    conv = CASES["conv1d"][2]
    with pytest.raises(ValueError, match="it takes a state or documents, not both"):
        causal_conv1d(**conv, seq_idx=torch.zeros(2, 20, dtype=torch.long), impl="causal_conv1d")
    with pytest.raises(ValueError, match="wants C a multiple of 8, got 9"):
        causal_conv1d(conv["x"][..., :9], conv["weight"][:9], impl="causal_conv1d")
    with pytest.raises(ValueError, match="it takes W from 2 to 4, got 1"):
        causal_conv1d(conv["x"], conv["weight"][:, :1], impl="causal_conv1d")


def test_a_gradient_that_the_package_would_drop_is_an_error(installed) -> None:
    inputs = {name: t.clone().requires_grad_() for name, t in CASES["selective_scan"][2].items()}
    with pytest.raises(ValueError, match="no gradient of the last state"):
        selective_scan(**inputs, impl="mamba_ssm")[1].sum().backward()


def test_a_missing_or_broken_package_and_a_wrong_device_are_sentences(monkeypatch) -> None:
    _, _, inputs, _ = CASES["ssd fla discrete"]
    if "fla" not in sys.modules:
        with pytest.raises(ValueError, match="ssd was asked to run in fla, which is not installed: pip install flash-linear-attention"):
            ssd(**inputs, impl="fla")
    monkeypatch.setitem(sys.modules, "fla", packages.stand_in("fla"))  # found, and empty: as a package whose extension does not load
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(
        ValueError, match="in fla, which is installed but cannot be imported .*: build flash-linear-attention for this torch"
    ):
        ssd(**inputs, impl="fla")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="ssd cannot run in fla: it needs tensors on CUDA, got cpu"):
        ssd(**inputs, impl="fla")


@pytest.mark.slow
def test_the_packages_themselves() -> None:
    """In a process of its own: where these packages can be imported, transformers takes its CUDA paths."""
    folder = os.environ.get("LLAMBA_TEST_PACKAGES")
    if not folder:
        pytest.skip("needs mamba-ssm, causal-conv1d and flash-linear-attention in the folder LLAMBA_TEST_PACKAGES (README, Development)")
    path = os.pathsep.join([folder, *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, packages.__file__], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["case"] for row in rows} == set(CASES) and Path(packages.__file__).exists()
    for row in rows:
        for name, error in row["errors"].items():
            assert error <= 2e-5, f"{row['case']}, {name}: relative RMS error {error:.1e}"
