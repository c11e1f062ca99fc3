"""What can be known to be wrong before the first stage begins, so that no stage fails after days for it: data, models, layers, packages.

Only stages that are still to do are looked at. Of models, configurations, tokenizers and the names and shapes of the weights are read;
the weights' numbers, once, of a teacher that is still to be converted and of stages' own teachers.
"""

from pathlib import Path

from llamba.base.folders import DONE, finished
from llamba.chat.engines import require_vllm
from llamba.data import pairs, sources
from llamba.data import tokens as data
from llamba.data.chat_templates import AUTO, chosen, named, require_fit, require_marks
from llamba.models.convert import require_teacher, student_config
from llamba.models.draft import draft_config
from llamba.models.hybrid import mixer_layers
from llamba.models.loading import (
    SPANS_INSTEAD,
    has_tokenizer,
    load_config,
    load_tokenizer,
    located,
    require_alike,
    require_bitsandbytes,
    require_model,
    require_same_vocabulary,
    require_sound,
    vocabularies_differ,
)
from llamba.models.mixers import ATTENTION, MIXERS, Mixer, NoMixer
from llamba.running.inputs import limit_of, missing, pairing
from llamba.settings import (
    Aligning,
    Data,
    Distill,
    Dpo,
    Draft,
    Hidden,
    Matrix,
    PseudoLabel,
    Recipe,
    Select,
    Sft,
    Stage,
    TokenTraining,
    Training,
    layers_of,
)
from llamba.training import lora
from llamba.training.reporters import require_reporters
from llamba.training.trainer import accumulation


def check(recipe: Recipe, out: Path) -> None:
    """Raises ValueError for the first thing that a stage still to be done in the run folder `out` needs, and that is missing or unfit."""
    stages = {number: stage for number, stage in enumerate(recipe.stages, 1) if not stage.skip}
    todo = {number: stage for number, stage in stages.items() if not (out / f"{number}-{stage.name}" / DONE).exists()}
    for number, stage in todo.items():
        made = {other.name for before, other in stages.items() if before < number and isinstance(other, PseudoLabel)}
        _check_data(recipe, number, stage, made)
        _check_template(recipe, number, stage)
        _check_packages(stage)
        _check_model(recipe, stage, out)
        if isinstance(stage, Training):
            accumulation(stage)
            require_reporters(stage.report_to)
    _check_layers(recipe, list(todo.values()), out)
    _check_first_student(recipe, list(todo.values()), out)
    _check_teacher(recipe, out)


def _of_this_run(name: str, out: Path) -> bool:
    """Whether a path is one that the run itself may make."""
    return Path(name).resolve().is_relative_to(out.resolve())


def _check_data(recipe: Recipe, number: int, stage: Stage, made: set[str]) -> None:
    """Sources that are files exist, those that stages make have their stage (`made`), and how much of a stream to read is said."""
    config = stage.data or recipe.data
    for source in [*data.names(config.train), *data.names(config.eval)]:
        kind, _, name = source.partition(":")
        if kind == "stage" and name not in made:
            raise ValueError(missing(source, number))
        if kind != "stage" and not _of_this_run(source, Path(recipe.output)):
            sources.files(source)
    if config.template not in (None, AUTO):
        named(config.template)
    if isinstance(stage, Dpo):
        pairs.require_whole(config)
    if isinstance(stage, (TokenTraining, Select, Sft, Dpo)):
        limit_of(config, stage)


def _check_template(recipe: Recipe, number: int, stage: Stage) -> None:
    """There is a tokenizer for a stage that reads rows; its template writes what the tokenizer's own writes, and marks what is learnt."""
    if not isinstance(stage, (TokenTraining, Select, Sft, Dpo, PseudoLabel)):
        return
    name, config = recipe.teacher, stage.data or recipe.data
    asked = stage.teacher if isinstance(stage, PseudoLabel) and stage.teacher else name
    if _of_this_run(asked, Path(recipe.output)):
        return
    if not has_tokenizer(asked):
        raise ValueError(
            f"stage {stage.name} reads rows and needs a tokenizer, and {asked} has none; copy the original model's files into it"
        )
    tokenizer = load_tokenizer(asked)
    template = chosen(config, tokenizer)
    key = "data.template" if stage.data is None else f"stages.{number - 1}.data.template"
    if not isinstance(stage, PseudoLabel) and stage.targets in ("assistant", "answers"):
        require_marks(template, key)
    require_fit(template, tokenizer, key)


def _check_learns(stage: Training, kind: str) -> None:
    """What the stage trains is there in a student with mixers of this kind ("none": without any)."""
    if stage.train in ("mixers", "new") and kind == "none":
        raise ValueError(f"{stage.name}.train={stage.train!r} needs a student whose mixers have weights, got one without; use train='all'")
    if stage.train == "new" and kind == ATTENTION:
        raise ValueError(f"{stage.name}.train='new' needs mixers that are not attention, got mixer='attention'; use train='mixers'")


def _check_first_student(recipe: Recipe, todo: list[Stage], out: Path) -> None:
    """Stages before any further conversion or selection find in the student what they train, and in the teacher what they read."""
    if finished(out):
        return
    config = load_config(located(recipe.teacher))
    made = student_config(config, recipe.student.mixer, layers_of(recipe.student.attention), recipe.student.options)
    kind = made.to_dict()["mixer"]["kind"]
    for stage in todo:
        if stage.attention is not None or isinstance(stage, Select):
            return
        _check_length(stage, stage.data or recipe.data, config.max_position_embeddings)
        if isinstance(stage, Distill) and stage.offline and stage.offline > config.vocab_size:
            raise ValueError(f"distill.offline must be at most the vocabulary's {config.vocab_size} tokens, got {stage.offline}")
        if isinstance(stage, Training) and not isinstance(stage, Draft):
            _check_learns(stage, kind if mixer_layers(made) else "none")
        if isinstance(stage, Matrix) and kind in MIXERS and MIXERS[kind].mixing in (Mixer.mixing, NoMixer.mixing):
            raise ValueError(f"stage matrix needs mixers that have a matrix, and {kind!r} has none; use mamba2, or leave the stage out")


def _check_teacher(recipe: Recipe, out: Path) -> None:
    """A teacher that is still to be converted is of a family that can be, has a tokenizer, and every weight, each of them finite."""
    name = located(recipe.teacher)
    if finished(out):
        require_model(name)
    else:
        require_teacher(name)
        load_tokenizer(name)
        require_sound(name)


def _check_length(stage: Stage, data: Data, context: int) -> None:
    """Raises ValueError for rows longer than the teacher can read."""
    if isinstance(stage, (TokenTraining, Sft, Dpo)) and data.length > context:
        raise ValueError(f"data.length of stage {stage.name} must be at most the teacher's context of {context} tokens, got {data.length}")


def _check_packages(stage: Stage) -> None:
    if isinstance(stage, Distill) and stage.teacher_bits is not None:
        require_bitsandbytes(stage.teacher_bits)
    if isinstance(stage, Aligning) and stage.lora is not None:
        lora.require_packages(stage.lora)
    if isinstance(stage, PseudoLabel) and stage.engine == "vllm":
        require_vllm()


def _check_model(recipe: Recipe, stage: Stage, out: Path) -> None:
    """A stage's own teacher, or reference, can be had and fits the student, which has the shape of the recipe's teacher; so do drafts."""
    name = stage.teacher if isinstance(stage, (Matrix, Hidden, Distill, PseudoLabel)) else None
    if isinstance(stage, Dpo) and stage.reference not in ("input", "teacher"):
        name = stage.reference
    if isinstance(stage, Draft):
        draft_config(require_model(located(recipe.teacher)), stage.layers, stage.head)
    if name is None or _of_this_run(name, out):
        return
    student, other = located(recipe.teacher), located(name)
    require_sound(other)
    if isinstance(stage, Distill) and stage.match == "spans":
        _check_spans(stage, stage.data or recipe.data, student, other)
    elif not isinstance(stage, PseudoLabel):  # which hands on words, not tokens
        instead = SPANS_INSTEAD if isinstance(stage, Distill) else ""
        require_same_vocabulary(student, other, instead)
    if isinstance(stage, (Matrix, Hidden)):
        require_alike(stage.name, student, other)


def _check_spans(stage: Distill, config: Data, student: str, teacher: str) -> None:
    """Where the two models count different tokens, both tokenizers know where their tokens stand and mark what is learnt."""
    if not vocabularies_differ(student, teacher):
        return
    if stage.temperature != 1.0:
        raise ValueError(
            f"distill.temperature is that of tokens, and spans have distill.span_temperature; got {stage.temperature} with match='spans'"
        )
    paired = pairing(config, student, teacher)
    if stage.targets == "assistant":
        paired.require_chats()


def _check_layers(recipe: Recipe, todo: list[Stage], out: Path) -> None:
    """Further conversions ask for attention that is still there."""
    if all(stage.attention is None for stage in todo):
        return
    steps, mixer, options = finished(out), recipe.student.mixer, recipe.student.options
    config = require_model(str(steps[-1]) if steps else located(recipe.teacher))
    if not steps:
        config = student_config(config, mixer, layers_of(recipe.student.attention), options)
    for stage in todo:
        if isinstance(stage.attention, str) and _of_this_run(stage.attention, out):
            return  # a list that is still to be measured
        if stage.attention is not None:
            config = student_config(config, mixer, layers_of(stage.attention), options)
        if isinstance(stage, Select):
            return  # which layers it gives attention back is not known yet
