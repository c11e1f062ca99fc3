"""What a model's name means: a run folder, a model folder, or a hub name."""

from pathlib import Path

DONE = "DONE"
ROWS = "rows"  # the data folder that a stage leaves where it makes data


def finished(folder: str | Path, holding: str = "config.json") -> list[Path]:
    """The finished steps of a run folder that hold a file or folder of that name (by default: models), in order.

    Of one number, the conversion comes before the stage; a draft model stands beside the students and is not listed.
    """
    done = (marker.parent for marker in Path(folder).glob(f"*-*/{DONE}"))
    steps = [step for step in done if step.name.partition("-")[0].isdigit() and (step / holding).exists()]
    students = [step for step in steps if not step.name.endswith("-draft")]
    return sorted(students, key=lambda step: (int(step.name.partition("-")[0]), not step.name.endswith("-convert")))


def resolve_model(name: str | Path) -> str:
    """What to load where a model is expected: a run folder means its last finished step, all else means itself.

    Raises ValueError for a folder that is neither a model nor a run with a finished step, and for a path that does not exist.
    """
    path = Path(name)
    if path.is_dir():
        steps = finished(path)
        if steps:
            return str(steps[-1])
        if not (path / "config.json").is_file():
            found = sorted(entry.name for entry in path.iterdir())[:8] or "nothing"
            raise ValueError(f"{name} must be a model folder (with config.json) or a run folder with a finished stage, found {found}")
        return str(path)
    if path.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise ValueError(f"{name} must be a model folder, a run folder or a hub name (org/name), found no such folder")
    return str(name)
