"""A wheel of the tree, installed where nothing else of it is: the command, the recipes and the evaluation scripts run from there."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from what git knows, without the network: setuptools is this environment's."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, listed):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True, text=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory) -> Path:
    """A new environment with the wheel; of the packages that it depends on it sees this environment's."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = folder / "lib" / version / "site-packages"
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    subprocess.run([*install, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def outside(environment: Path, tmp_path: Path, *command: str) -> str:
    """The output of a command that knows the environment and not the checkout."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean |= {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command(environment: Path, tmp_path: Path) -> None:
    assert "convert" in outside(environment, tmp_path, "llamba", "--help")
    assert outside(environment, tmp_path, "python", "-m", "llamba", "--version").startswith("llamba ")
    place = outside(environment, tmp_path, "python", "-c", "import llamba; print(llamba.__file__)").strip()
    assert Path(place).is_relative_to(environment)


def test_a_recipe(environment: Path, tmp_path: Path) -> None:
    assert "hours" in outside(environment, tmp_path, "python", "-m", "llamba.recipes.llama3_50pct", "--plan")


@pytest.mark.parametrize("script", ["run_mtbench.sh", "run_alpaca.sh", "run_lm_eval.sh"])
def test_the_evaluation_scripts(environment: Path, tmp_path: Path, script: str) -> None:
    (place,) = environment.glob(f"lib/*/site-packages/llamba/eval/{script}")
    assert os.access(place, os.X_OK)
    assert "MODEL" in outside(environment, tmp_path, str(place), "--help")


def test_everything_but_python_that_is_needed_is_in_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for suffix in (".jinja", ".yaml", ".safetensors", ".json", ".sh"):
        assert any(name.startswith("llamba/") and name.endswith(suffix) for name in names), suffix
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
