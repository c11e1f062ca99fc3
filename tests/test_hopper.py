"""The kernels compiled for Hopper: `tests/hopper.json` holds every kernel at the shapes of three teachers, and what it may use there."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLE = json.loads((HERE / "hopper.json").read_text())
SHAPES = {"meta-llama-3-8b", "smollm2-135m", "qwen3-4b"}
SHARED = 227 * 1024  # bytes that a program can have there
PRODUCTS = {"carry", "outputs", "head_gradients", "shared_gradients"}  # of matrices large enough for Hopper's own instructions
SPILLS = {  # bytes of registers that a thread keeps in memory at most; docs/gpu.md says why. No other kernel spills.
    ("head_gradients", "bfloat16"): 312,
    ("shared_gradients", "bfloat16"): 80,
    ("mamba2_dual", "bfloat16"): 1864,
    ("outputs", "float32"): 1144,
    ("head_gradients", "float32"): 3232,
    ("shared_gradients", "float32"): 1336,
    ("mamba2_dual", "float32"): 1768,
    ("window_round", "bfloat16"): 48,
    ("window_round", "float32"): 1008,
}


def launched(folder: Path) -> set[str]:
    """Names of the kernels of a folder: functions for Triton that no other of them calls or hands on."""
    made, called = set(), set()
    for path in folder.rglob("triton_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(how) for how in node.decorator_list):
                made.add(node.name)
                calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
                called |= {name.id for call in calls for name in (call.func, *call.args) if isinstance(name, ast.Name)}
    return made - called


def key(row: dict) -> tuple:
    return row["kernel"], row["dtype"], row["about"], *row["shapes"]


def compiled(*options: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(HERE / "hopper.py"), *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_limits(rows: list[dict]) -> None:
    for row in rows:
        assert row["shared"] <= SHARED and row["registers"] <= 255, row
        assert row["stack"] <= SPILLS.get((row["kernel"], row["dtype"]), 0), row
        assert row["wgmma"] or row["kernel"] not in PRODUCTS, row


def check_against_the_table(rows: list[dict]) -> None:
    """The same variants; with the table's version of Triton, the same numbers."""
    import triton

    table = {key(row): row for row in TABLE["rows"]}
    check_limits(rows)
    for row in rows:
        assert row == table[key(row)] or triton.__version__ != TABLE["triton"], "python tests/hopper.py --write"


def test_every_kernel_has_a_row_for_every_shape_and_number_format() -> None:
    found = {(row["kernel"], row["dtype"], shape) for row in TABLE["rows"] for shape in row["shapes"]}
    kernels = launched(HERE.parent / "kernels")
    assert len(kernels) > 20, "the search finds them"
    assert found == {(kernel, dtype, shape) for kernel in kernels for dtype in ("bfloat16", "float32") for shape in SHAPES}
    assert len({key(row) for row in TABLE["rows"]}) == len(TABLE["rows"])


def test_no_kernel_needs_what_hopper_has_not_and_those_that_spill_are_named() -> None:
    check_limits(TABLE["rows"])
    spilled: dict = {}
    for row in TABLE["rows"]:
        at = row["kernel"], row["dtype"]
        spilled[at] = max(row["stack"], spilled.get(at, 0))
    assert {at: most for at, most in spilled.items() if most} == SPILLS, "a number that fell is to be lowered here as well"


def test_the_short_form_stands_in_the_docs() -> None:
    lines = {" | ".join(map(str, _summary(name))) for name in {row["kernel"] for row in TABLE["rows"]}}
    shown = (HERE.parent / "docs" / "gpu.md").read_text()
    assert all(f"| {line} |" in shown for line in lines), sorted(line for line in lines if f"| {line} |" not in shown)


def _summary(name: str) -> list[str]:
    both = [[row for row in TABLE["rows"] if (row["kernel"], row["dtype"]) == (name, dtype)] for dtype in ("bfloat16", "float32")]
    most = [[max(row[what] for row in rows) for rows in both] for what in ("registers", "stack", "shared")]
    cells = [[len(rows) for rows in both], most[0], most[1], [round(value / 1024) for value in most[2]]]
    return [f"`{name}`", *(f"{bf16} / {fp32}" for bf16, fp32 in cells)]


def test_a_sample_compiles_as_the_table_says() -> None:
    names = ("norm_rows", "advance_rule", "window_round")
    rows = compiled("--dtypes", "bfloat16", "--kernels", *names)
    assert {row["kernel"] for row in rows} == set(names)
    check_against_the_table(rows)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_everything_compiles_as_the_table_says(dtype: str) -> None:
    """ptxas takes it all; the products of matrices run on tensor cores, from shared memory that there is."""
    rows = compiled("--dtypes", dtype)
    assert {key(row) for row in rows} == {key(row) for row in TABLE["rows"] if row["dtype"] == dtype}
    check_against_the_table(rows)
