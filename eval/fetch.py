"""Benchmark data: from its public homes into the cache, checked by size and SHA-256. Nothing of it ships with this package."""

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamba.eval import foreign

_FASTCHAT = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data"
_ALPACA = "https://huggingface.co/datasets/tatsu-lab/alpaca_eval/resolve/2edc6fad8be6b14ea7230aabfd08188da6b8b814"
_PUBMEDQA = "https://raw.githubusercontent.com/pubmedqa/pubmedqa/master/data"


@dataclass(frozen=True)
class File:
    """A file below the data folder, its home, and what it must be (size in bytes and SHA-256; None: not known to us)."""

    path: str
    url: str
    size: int | None
    sha256: str | None


FILES: dict[str, tuple[File, ...]] = {
    "mt_bench": (
        File("mt_bench/question.jsonl", f"{_FASTCHAT}/mt_bench/question.jsonl", 48_929,
             "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7"),
        File("mt_bench/reference_answer/gpt-4.jsonl", f"{_FASTCHAT}/mt_bench/reference_answer/gpt-4.jsonl", 51_109,
             "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f"),
        File("mt_bench/judge_prompts.jsonl", f"{_FASTCHAT}/judge_prompts.jsonl", 10_449,
             "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6"),
    ),
    "alpaca_eval": (
        File("alpaca_eval/gpt4_1106_preview_outputs.json", f"{_ALPACA}/alpaca_eval_gpt4_baseline.json", 1_899_765,
             "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4"),
        File("alpaca_eval/df_gamed.csv", f"{_ALPACA}/df_gamed.csv", None,
             "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d"),
        File("alpaca_eval/instruction_difficulty.csv", f"{_ALPACA}/instruction_difficulty.csv", None,
             "e28d875bb334f75e17acd1e4ed659b261860e3db379cf5de29060301bed0a18b"),
    ),
    "pubmedqa": (
        File("pubmedqa/ori_pqal.json", f"{_PUBMEDQA}/ori_pqal.json", 2_584_787, None),
        File("pubmedqa/test_ground_truth.json", f"{_PUBMEDQA}/test_ground_truth.json", 11_414, None),
    ),
    "gsm8k": (
        File("gsm8k/test.jsonl", "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/test.jsonl",
             749_738, "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    ),
    "cruxeval": (
        File("cruxeval/cruxeval.jsonl", "https://raw.githubusercontent.com/facebookresearch/cruxeval/main/data/cruxeval.jsonl", None, None),
    ),
}  # fmt: skip


def cache() -> Path:
    """Where fetched data lies: LLAMBA_CACHE/eval, by default ~/.cache/llamba/eval."""
    return Path(os.environ.get("LLAMBA_CACHE", Path.home() / ".cache" / "llamba")) / "eval"


def _what_is_wrong(file: File, content: bytes) -> str | None:
    if file.size is not None and len(content) != file.size:
        return f"must have {file.size} bytes, got {len(content)}"
    found = hashlib.sha256(content).hexdigest()
    if file.sha256 is not None and found != file.sha256:
        return f"must have SHA-256 {file.sha256}, got {found}"
    return None


def _download(file: File, to: Path) -> None:
    try:
        with urllib.request.urlopen(file.url, timeout=60) as response:
            content = response.read()
    except (urllib.error.URLError, TimeoutError) as error:
        raise ValueError(
            f"{file.url} cannot be reached ({error}); offline, get it on another machine, put it at {to} and run this again, "
            "or pass --data DIR, a folder that holds it in the same place"
        ) from error
    if wrong := _what_is_wrong(file, content):
        raise ValueError(f"{file.url} {wrong}; it was changed at its home or on the way; nothing was kept")
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(to.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, to)


def fetch(names: Sequence[str] = tuple(FILES)) -> list[str]:
    """Get these benchmarks' files into the cache, and check those that are there; returns one line per file.

    Raises ValueError for an unknown name, without a network, and for a file that is not what it should be.
    """
    if unknown := [name for name in names if name not in FILES]:
        raise ValueError(f"the benchmarks are {', '.join(FILES)}, got {', '.join(unknown)}")
    lines = []
    for file in (file for name in names for file in FILES[name]):
        path = cache() / file.path
        if path.exists():
            if wrong := _what_is_wrong(file, path.read_bytes()):
                raise ValueError(f"{path} {wrong}; delete it and run this again")
        else:
            _download(file, path)
        checked = "SHA-256 checked" if file.sha256 else "size checked" if file.size else "its home publishes no checksum"
        lines.append(f"{path} ({checked})")
    return lines


def data_file(path: str, folder: str | None) -> Path:
    """A benchmark's file in the user's `folder`, or in the cache. Raises ValueError where it is in neither."""
    found = (Path(folder) if folder else cache()) / path
    if not found.is_file():
        name = path.partition("/")[0]
        raise ValueError(
            f"{found} is needed and not there; `llamba eval fetch {name}` gets it (network), or pass --data DIR with DIR/{path} in it"
        )
    return found


def identity(path: Path) -> dict[str, Any]:
    """A data file's SHA-256, and whether it is the published file."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"sha256": found, "published": any(found == file.sha256 for files in FILES.values() for file in files)}


def read_json_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .json or .jsonl file. Raises ValueError for anything else."""
    return [row for _, row in foreign.rows(path)]
