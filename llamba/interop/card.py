"""A model card: what a student was made of and how, what it scored and under which judge, and how it is loaded."""

import json
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from llamba.base.folders import resolve_model

UNKNOWN_LICENCE = "other"
HOW = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.{load}("{name}", trust_remote_code=True)  # the code lies beside the weights; PyTorch alone
tokenizer = AutoTokenizer.{load}("{name}")
```

With `llamba` installed, `import llamba` takes the place of `trust_remote_code=True`, and its Triton kernels are used on a GPU."""


def card(folder: Path, config: PreTrainedConfig) -> str:
    """The text of README.md for a student in `folder`, a model folder or a run; says of everything that is not recorded that it is not."""
    step = Path(resolve_model(folder))
    run = next((place for place in (folder, step.parent) if (place / "recipe.json").is_file()), None)
    recipe = {} if run is None else json.loads((run / "recipe.json").read_text())
    teacher = recipe.get("teacher")
    licence = _licence(teacher)
    front = ["---", f"license: {licence}", "library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"base_model: {teacher}"] if teacher and not Path(teacher).exists() else []
    parts = ["\n".join([*front, "tags: [mamba, hybrid, distillation, llamba]", "---"]), f"# {folder.resolve().name}"]
    parts += [_what(config, teacher), "## How to load it", HOW.format(load="from_pretrained", name=f"PATH/{folder.resolve().name}")]
    parts += ["## How it was made", _recipe(recipe), "## Scores", _scores(run, step), "## Licence", _of_licence(teacher, licence)]
    return "\n\n".join(parts) + "\n"


def _what(config: PreTrainedConfig, teacher: str | None) -> str:
    kinds = config.layer_types
    recurrent = sum(kind == "linear_attention" for kind in kinds)
    mixer = config.to_dict()["mixer"]
    origin = f"made from {teacher}" if teacher else "whose teacher is not recorded beside it"
    return (
        f"A hybrid language model {origin}: {recurrent} of {len(kinds)} layers hold a recurrent mixer ({mixer['kind']}, state "
        f"{mixer['state']}) where attention stood; the others keep attention."
    )


def _recipe(recipe: dict[str, Any]) -> str:
    if not recipe:
        return "No recipe is recorded beside this model."
    stages = "\n".join(
        f"* {stage.get('name') or stage.get('stage') or 'stage'}: `{json.dumps(stage)}`" for stage in recipe.get("stages", [])
    )
    return f"Student: `{json.dumps(recipe.get('student'))}`\n\n{stages}\n\nSeed {recipe.get('seed')}."


def _scores(run: Path | None, step: Path) -> str:
    places = [place / "scores.jsonl" for base in (run, step) if base is not None for place in (base / "eval", base)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return "None are recorded beside this model."
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    lines = ["| benchmark | metric | model | value | judge |", "|---|---|---|---|---|"]
    for row in rows:
        interval = f" [{row['low']:.3g}, {row['high']:.3g}]" if "low" in row else ""
        value = f"{row['value']:.4g}{interval}"
        lines.append(f"| {row['benchmark']} | {row['metric']} | {row['model']} | {value} | {row.get('judge') or 'nobody judges'} |")
    return "\n".join(lines)


def _licence(teacher: str | None) -> str:
    readme = Path(teacher or "") / "README.md"
    found = re.search(r"^license:\s*(\S+)\s*$", readme.read_text(), re.MULTILINE) if teacher and readme.is_file() else None
    return found[1] if found else UNKNOWN_LICENCE


def _of_licence(teacher: str | None, licence: str) -> str:
    if licence == UNKNOWN_LICENCE:
        return f"The teacher's licence holds for this model; it is not recorded here{f' (look at {teacher})' if teacher else ''}."
    return f"The teacher's licence holds for this model: {licence}."
