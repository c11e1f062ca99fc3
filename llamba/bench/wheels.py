"""Wheels to carry to a GPU machine that reaches no package index: fetched for its Python, listed with their sizes.

    python -m llamba.bench.wheels FOLDER

For Linux on x86-64 with Python 3.12, torch, triton and transformers already there. On that machine, without network:
`python -m pip install --no-index --no-deps --target /tmp/site FOLDER/*.whl`, and /tmp/site on PYTHONPATH.
"""

import subprocess
import sys
from pathlib import Path

from llamba.base.errors import one_line_errors

WHEELS = (
    "trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "gguf==0.19.0", "flash-linear-attention==0.6.0",
    "fla-core==0.6.0",
)  # fmt: skip
PYTHON, PLATFORMS = "3.12", ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MOST = 48 * 2**20  # bytes in all, so that weights and data have room beside them


def fetch(folder: Path) -> list[Path]:
    """Download the wheels into a folder, new or not. Raises ValueError where pip cannot, and where they are too large together."""
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    done = subprocess.run(
        [*command, "--python-version", PYTHON, *platforms, "--dest", str(folder), *WHEELS], capture_output=True, text=True
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"pip could not download the wheels: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    found = sorted(folder.glob("*.whl"))
    total = sum(path.stat().st_size for path in found)
    if total > MOST:
        raise ValueError(f"the wheels must have at most {MOST / 2**20:.0f} MiB together, got {total / 2**20:.1f} in {folder}")
    return found


def main(arguments: list[str]) -> None:
    """Fetch and list."""
    if len(arguments) != 1:
        raise ValueError(f"needed one argument, the folder for the wheels; got {len(arguments)}")
    found = fetch(Path(arguments[0]))
    for path in found:
        print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.name}")
    print(f"{sum(path.stat().st_size for path in found) / 2**20:8.2f} MiB  in all, for Python {PYTHON}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
