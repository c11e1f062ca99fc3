"""What a stage reads: rows that earlier stages made, how much of a stream, and from where."""

import dataclasses
from pathlib import Path
from typing import Any

from llamba.base.folders import ROWS, finished
from llamba.base.foreign import read_object
from llamba.data import tokens as data
from llamba.data.spans import Pairing
from llamba.models.loading import load_config, load_tokenizer, located, vocabularies_differ
from llamba.settings import Data, Distill, Dpo, Recipe, Select, Sft, Stage, TokenTraining

STAGE = "stage.json"
Reading = TokenTraining | Select | Sft | Dpo  # the stages that read tokens


def number_of(folder: Path) -> int:
    """A step's number in its run folder: 2 of `2-distill`."""
    return int(folder.name.partition("-")[0])


def sources_of(data: Data, out: Path, number: int) -> Data:
    """The data of stage `number` with `stage:NAME` replaced by the rows that the last such stage before it left."""

    def resolve(source: str) -> str:
        kind, _, name = source.partition(":")
        if kind != "stage":
            return source
        made = [folder for folder in finished(out, ROWS) if folder.name.partition("-")[2] == name and number_of(folder) < number]
        if not made:
            raise ValueError(missing(source, number))
        return str(made[-1] / ROWS)

    def every(given: str | list[str] | None) -> Any:
        return [resolve(source) for source in given] if isinstance(given, list) else given and resolve(given)

    return dataclasses.replace(data, train=every(data.train), eval=every(data.eval))


def missing(source: str, number: int) -> str:
    """The message for a source `stage:NAME` that no stage before stage `number` makes."""
    return f"data source {source} needs an earlier stage {source.partition(':')[2]!r}, and stage {number} has none before it"


def limit_of(data: Data, stage: Reading) -> int | None:
    """The tokens to read of streamed data. Raises ValueError where the stage does not say how many it needs."""
    if not data.streaming:
        return None
    if isinstance(stage, Select):
        return stage.rows * data.length
    if stage.tokens is None and stage.steps is None:
        raise ValueError(f"data.streaming needs {stage.name}.tokens or {stage.name}.steps, to know how much to read; got neither")
    return stage.tokens or (stage.steps or 0) * stage.batch * data.length


def _stopped(path: Path) -> dict[str, int]:
    """Place of a streamed source -> the row at which a stage stopped. Raises ValueError where stage.json says something else."""
    found = read_object(path).get("stopped_at", {})
    if not isinstance(found, dict) or not all(type(row) is int and row >= 0 for row in found.values()):
        raise ValueError(f"{path}: stopped_at must say a row for each source, got {str(found)[:60]}; restore the file")
    return found


def other_teacher(recipe: Recipe, stage: Stage, student: str) -> str | None:
    """The teacher that a stage compares with by spans, since it counts other tokens than the model `student`; None where there is none."""
    if not isinstance(stage, Distill) or stage.match == "tokens":
        return None
    teacher = located(stage.teacher or recipe.teacher)
    return teacher if vocabularies_differ(student, teacher) else None


def pairing(config: Data, student: str, teacher: str) -> Pairing:
    """What finds the spans that rows share in the tokens of both models. Raises ValueError for tokenizers that cannot serve."""
    return Pairing(config, load_tokenizer(student), load_tokenizer(teacher), load_config(teacher).max_position_embeddings)


def starts_of(config: Data, out: Path, number: int) -> dict[str, int]:
    """Where stage `number` goes on reading streamed sources: the rows at which the stages before it stopped, as their stage.json says."""
    if not config.streaming:
        return {}
    found: dict[str, int] = {}
    for path in sorted(out.glob(f"*-*/{STAGE}"), key=lambda path: number_of(path.parent)):
        if number_of(path.parent) < number:
            found |= _stopped(path)
    places = {data.source_key(source, config.part) for source in data.names(config.train)}
    return {place: row for place, row in found.items() if place in places and row}
