"""What made a number: commit, command, versions, hardware, date."""

import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("llamba", "torch", "transformers", "accelerate", "safetensors", "tokenizers")


def version(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    return {"python": platform.python_version()} | {package: found for package in packages if (found := version(package))}


def commit() -> str | None:
    """Commit of this code where it runs from a checkout, with + for uncommitted changes."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def command() -> str:
    """The command line of this process, as a shell takes it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def hardware() -> str:
    """The accelerator's name, or the processor and its threads."""
    import torch  # here, so that `llamba --version` need not wait for it

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def stamp(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """What makes a row of results one that can be repeated."""
    return {
        "commit": commit(),
        "command": command(),
        "versions": versions(packages),
        "hardware": hardware(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def append_row(path: str | Path, row: dict[str, Any]) -> None:
    """Add a row and its stamp to a .jsonl file."""
    with Path(path).open("a") as file:
        file.write(json.dumps(row | stamp()) + "\n")
