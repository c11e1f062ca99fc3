"""A folder as a few files of at most so many bytes, to carry to a machine in several calls; and the folder again.

Each piece's name says which it is, of how many, and the SHA-256 of them all: `piece-1-of-2-DIGEST`.
"""

import hashlib
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

NAME = re.compile(r"piece-(\d+)-of-(\d+)-([0-9a-f]{64})")


def split(folder: Path, out: Path, most: int) -> list[Path]:
    """The content of `folder` in pieces of about one size, at most `most` bytes each, piece K in `out`/K."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        whole = Path(work) / "whole"
        with tarfile.open(whole, "w:gz", compresslevel=6) as archive:
            archive.add(folder, arcname=".")
        size = whole.stat().st_size
        count = -(-size // most)
        with whole.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            made = []
            for number in range(1, count + 1):
                made.append(out / str(number) / f"piece-{number}-of-{count}-{digest}")
                made[-1].parent.mkdir(parents=True, exist_ok=True)
                made[-1].write_bytes(file.read(-(-size // count)))
    return made


def joined(folders: Iterable[Path], into: Path) -> Path:
    """Put the pieces in these folders together and unpack them into `into`, a new folder that appears whole or not at all.

    Raises ValueError where pieces of one whole are missing, or are not what they were.
    """
    found = {match: path for folder in folders for path in sorted(folder.iterdir()) if (match := NAME.fullmatch(path.name))}
    numbers = {int(match[1]): path for match, path in found.items()}
    wholes = {(int(match[2]), match[3]) for match in found}
    if len(wholes) != 1 or set(numbers) != set(range(1, min(wholes)[0] + 1)):
        raise ValueError(f"all pieces of one whole are needed (piece-1-of-K-..., piece-2-of-K-...); got {sorted(map(str, found.values()))}")
    with tempfile.TemporaryFile() as whole:
        for number in sorted(numbers):
            whole.write(numbers[number].read_bytes())
        whole.seek(0)
        if (digest := hashlib.file_digest(whole, "sha256").hexdigest()) != min(wholes)[1]:  # type: ignore[arg-type]
            raise ValueError(f"the pieces must have SHA-256 {min(wholes)[1]} together, got {digest}; carry them again")
        whole.seek(0)
        partial = into.with_name(f"{into.name}.partial")
        with tarfile.open(fileobj=whole) as archive:
            archive.extractall(partial, filter="data")
        os.replace(partial, into)
    return into
