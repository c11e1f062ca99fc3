"""What a model's name means: a run folder, a model folder, a GGUF file, or a hub name."""

from pathlib import Path

from llamba.base.packages import carried_file, is_carried

DONE = "DONE"
GGUF = ".gguf"
ROWS = "rows"  # the data folder that a stage leaves where it makes data


def _steps(folder: str | Path, holding: str) -> list[Path]:
    """The finished steps of a run folder that hold a file or folder of that name, in order; of one number the conversion comes first."""
    done = (marker.parent for marker in Path(folder).glob(f"*-*/{DONE}"))
    steps = [step for step in done if step.name.partition("-")[0].isdigit() and (step / holding).exists()]
    return sorted(steps, key=lambda step: (int(step.name.partition("-")[0]), not step.name.endswith("-convert")))


def finished(folder: str | Path, holding: str = "config.json") -> list[Path]:
    """The finished steps of a run folder that hold a file or folder of that name (by default: models), in order.

    A draft model stands beside the students and is not listed.
    """
    return [step for step in _steps(folder, holding) if not step.name.endswith("-draft")]


def is_gguf(name: str | Path) -> bool:
    """Whether a name means a GGUF file."""
    return str(name).endswith(GGUF) and Path(name).is_file()


def _gguf_in(folder: Path) -> str | None:
    """The one GGUF file of a folder without config.json, None where it has none. Raises ValueError where it has several."""
    found = sorted(folder.glob(f"*{GGUF}"))
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} GGUF files; name one of them, e.g. {found[0]}")
    return str(found[0]) if found else None


def resolve_model(name: str | Path) -> str:
    """What to load where a model is expected: a run folder means its last finished step, a folder with a GGUF file that file,
    `package:NAME` the file in that package, all else means itself.

    Raises ValueError for a folder that is neither a model nor a run with a finished step, and for a path that does not exist.
    """
    if is_carried(str(name)):
        return str(carried_file(str(name)))
    path = Path(name)
    if path.is_dir():
        steps = finished(path)
        if steps:
            return str(steps[-1])
        if not (path / "config.json").is_file():
            if file := _gguf_in(path):
                return file
            found = sorted(entry.name for entry in path.iterdir())[:8] or "nothing"
            raise ValueError(f"{name} must be a model folder (with config.json) or a run folder with a finished stage, found {found}")
        return str(path)
    if is_gguf(path):
        return str(path)
    if path.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise ValueError(f"{name} must be a model folder, a run folder, a GGUF file or a hub name (org/name), found no such folder")
    return str(name)


def resolve_draft(name: str | Path) -> str:
    """What to load where a draft is expected: a run folder means the last draft that it has made, all else as in `resolve_model`."""
    drafts = [step for step in _steps(name, "config.json") if step.name.endswith("-draft")]
    return str(drafts[-1]) if drafts else resolve_model(name)
