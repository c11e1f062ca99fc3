"""What a recipe would do: layers, parameters, tokens, memory, time on this machine and on GPUs. Needs neither weights nor network."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from llamba.base.folders import resolve_model
from llamba.data.chat_templates import chosen, marks_answers, require_fit
from llamba.interop.exporting import where_to
from llamba.models.convert import student_config
from llamba.models.draft import draft_config
from llamba.models.hybrid import mixer_layers
from llamba.models.loading import SPANS_INSTEAD, has_tokenizer, load_tokenizer, vocabularies_differ
from llamba.models.published import teacher_config
from llamba.running.costs import Cost, cost, sequences, teacher_bytes
from llamba.running.counts import Counts, count, numel
from llamba.running.machine import Machine, measured
from llamba.settings import Aligning, Attention, Data, Distill, Draft, PseudoLabel, Recipe, Select, Stage, Training, layers_of

GIB = 2**30
PEAK_FLOPS = 989e12  # dense bf16 of one H100 or H200
UTILISATION = 0.4  # of a GPU's arithmetic, supposed
REACHED = 0.5  # of the products that a CPU makes: what training steps reach, measured (docs/results.md, "Training on a CPU")
SMALL = 2e9  # parameters of student and teacher, up to which one GPU is the alternative


@dataclass(frozen=True)
class Plan:
    """A recipe's plan; `str` gives the text that `--plan` prints. `config` is the first student's; `machine`, where it was measured, what
    the time here is told by."""

    recipe: Recipe
    teacher: PreTrainedConfig
    config: PreTrainedConfig
    counts: Counts
    machine: Machine | None = None

    @property
    def kept(self) -> list[int]:
        """Layers that keep attention in the first student."""
        return _kept(self.config)

    def __str__(self) -> str:
        student = self.recipe.student
        lines = [
            f"teacher   {self.recipe.teacher}{_size(self.teacher, self.counts.teacher)}",
            f"student   {_mixer(self.config)}, init {student.init}, {self.config.num_hidden_layers} layers",
        ]
        lines += [_layers(self.config, student.attention), *_parameters(self.counts), *where_to(self.config)]
        lines += [*_templates(self.recipe), *([] if self.machine is None else [f"machine   {self.machine}"])]
        config, counts = self.config, self.counts
        for number, stage in enumerate(self.recipe.stages, 1):
            if stage.skip:
                lines.append(f"stage {number}   {stage.name}: left out")
                continue
            if stage.attention is not None:
                config = student_config(config, student.mixer, layers_of(stage.attention), student.options)
                counts = count(self.teacher, config)
                lines.append(f"then      {_layers(config, stage.attention)}")
            lines += _stage(self.recipe, number, stage, config, counts, self.machine)
            if isinstance(stage, Select):  # which layers is not known yet, but how many
                config = student_config(self.teacher, student.mixer, stage.keep, student.options)
                counts = count(self.teacher, config)
                lines.append(f"    attention back in {len(_kept(config))} of {config.num_hidden_layers} layers, those that measure best")
        return "\n".join(lines)


def _size(config: PreTrainedConfig, parameters: int) -> str:
    shape = f"{config.num_hidden_layers} layers, D {config.hidden_size}, V {config.vocab_size:,}"
    return f": {_millions(parameters)} parameters ({shape}), {2 * parameters / GIB:.2f} GiB in bf16"


def _templates(recipe: Recipe) -> list[str]:
    """What of the recipe's chat templates fits the teacher's tokenizer, where that is at hand: one line for each that is asked for."""
    teacher = resolve_model(recipe.teacher)
    if not Path(teacher).exists() or not has_tokenizer(teacher):
        return []
    tokenizer = load_tokenizer(teacher)
    own = ((f"stages.{number}.data.template", stage.data) for number, stage in enumerate(recipe.stages) if not stage.skip and stage.data)
    asked = dict[str | None, tuple[str, Data]]()
    for key, data in [("data.template", recipe.data), *own]:
        asked.setdefault(data.template, (key, data))
    return [f"template  {_fit(key, data, tokenizer)}" for key, data in asked.values() if not all(stage.skip for stage in recipe.stages)]


def _fit(key: str, data: Data, tokenizer: Any) -> str:
    try:
        found = chosen(data, tokenizer)
        require_fit(found, tokenizer, key)
    except ValueError as error:
        return f"does not fit: {error}"
    name = "none: the tokenizer has none" if found is None else found.name
    marks = "" if found is None or marks_answers(found.text) else ", which does not mark the assistant's words: only for targets='all'"
    return f"{name}{marks}"


def _mixer(config: PreTrainedConfig) -> str:
    """The mixer and what stands beside its recurrence."""
    beside = (f"{name} {config.mixer[name]}" for name in ("window", "sinks") if config.mixer.get(name))
    return ", ".join([config.mixer["kind"], *beside, *(["rotary"] if config.mixer.get("rotary") else [])])


def _kept(config: PreTrainedConfig) -> list[int]:
    return [i for i in range(config.num_hidden_layers) if i not in mixer_layers(config)]


def _layers(config: PreTrainedConfig, asked: Attention) -> str:
    kept, total = _kept(config), config.num_hidden_layers
    share = len(kept) / total
    note = f" (asked: {asked:g})" if isinstance(asked, float) and abs(share - asked) > 1e-9 else ""
    return f"attention kept in {len(kept)} of {total} layers = {share:.4g}{note}: {', '.join(map(str, kept)) or 'none'}"


def _parameters(c: Counts) -> list[str]:
    published, own = sum(c.published.values()), sum(c.own.values())
    lines = [
        f"each converted layer: {_millions(published)} in the published layout, {_signed(published - c.attention)} against attention"
        f" ({_millions(c.attention)}); {own:,} more of our own"
    ]
    lines += [f"    {name:<18}{count:>14,}" for name, count in c.published.items()]
    lines += [f"    {name:<18}{count:>14,}  ours" for name, count in c.own.items()]
    lines.append(f"parameters: teacher {_millions(c.teacher)}, student {_millions(c.student)}, mixers {_millions(c.mixers)}")
    return lines


def _stage(recipe: Recipe, number: int, stage: Stage, config: PreTrainedConfig, counts: Counts, machine: Machine | None) -> list[str]:
    if isinstance(stage, PseudoLabel):
        asked = (stage.data or recipe.data).train
        limit = f"{stage.max_new_tokens:,} tokens each, temperature {stage.temperature:g}"
        return [f"stage {number}   {stage.name}: {stage.teacher or recipe.teacher} answers {asked}, at most {limit}"]
    if not isinstance(stage, Training):
        return [f"stage {number}   {stage.name}"]
    if isinstance(stage, Draft):  # the student guides it
        made = draft_config(teacher_config(resolve_model(recipe.teacher)), stage.layers, None)
        config = student_config(made, recipe.student.mixer, 1.0)
        own = count(made, config)
        cut = 0 if stage.head is None else _cut(config, stage.head)
        counts = replace(own, student=own.student - cut, teacher=counts.student)
    taught = list[str]()
    if isinstance(stage, Distill) and stage.teacher is not None:
        found, parameters = _other_teacher(stage, stage.teacher, config)
        counts = replace(counts, teacher=parameters)
        taught = [f"    teacher {stage.teacher}{_size(found, parameters)}{_compared(stage, stage.teacher, found, recipe, config)}"]
    length = (stage.data or recipe.data).length
    taken, lora = cost(config, counts, stage, length), stage.lora if isinstance(stage, Aligning) else None
    how = str(stage.train) if lora is None else f"{stage.train}, LoRA of rank {lora.rank}"
    lines = [f"stage {number}   {stage.name}: trains {_millions(taken.trained)} ({how}), {_tokens(stage, length)}"]
    lines += [*taught, *_memory(taken, counts, sharded=lora is None)]
    if isinstance(stage, Distill) and stage.offline:
        teacher = counts.teacher * teacher_bytes(stage) / GIB
        lines.append(f"    before it the teacher ({teacher:.1f} GiB) runs once: {8 * stage.offline + 4:,} bytes on disk for each target")
    if machine is not None:
        lines.append(f"    here: {_here(taken, stage.precision, machine)}")
    processes = _gpus(counts)
    rate, amount = processes * PEAK_FLOPS * UTILISATION, "" if taken.tokens else " per 1,000,000,000 tokens"
    spent = taken.seconds(rate) if taken.tokens else 1e9 * taken.per_token / rate
    gpus = f"{processes} H100 at {UTILISATION:.0%} of peak (an estimate from arithmetic alone)"
    return [*lines, f"    {'or: ' if machine else ''}{_duration(spent or 0)}{amount} on {gpus}"]


def _gpus(counts: Counts) -> int:
    """GPUs that are spoken of: those of the launcher, else one for a small model and eight for others."""
    return int(os.environ.get("WORLD_SIZE", "0")) or (1 if counts.student + counts.teacher < SMALL else 8)


def _memory(taken: Cost, counts: Counts, sharded: bool) -> list[str]:
    processes = _gpus(counts)
    shares = f"; sharded over {processes} GPUs (ZeRO-3, FSDP2): {taken.sharded(processes) / GIB:.1f} GiB"
    return [
        "    memory of a device, nothing sharded: " + ", ".join(f"{name} {size / GIB:.1f}" for name, size in taken.memory.items()),
        f"    = {taken.bytes / GIB:.1f} GiB{' (DDP)' + shares if sharded and processes > 1 else ''}",
    ]


def _here(taken: Cost, precision: str, machine: Machine) -> str:
    """Time on this machine, by the products that it makes; or that it has too little memory."""
    on_cpu = machine.kind == "cpu"
    needed = taken.bytes if on_cpu else taken.sharded(machine.devices)
    if needed > machine.memory:
        return f"does not fit: {needed / GIB:.1f} GiB are needed, and there are {machine.memory / GIB:.1f}"
    share, devices = (REACHED, 1) if on_cpu else (UTILISATION, machine.devices)  # the cores were measured together
    rate = machine.rates[precision] * share * devices
    amount = "" if taken.tokens else " per 1,000,000 tokens"
    basis = "measured (docs/results.md)" if on_cpu else "supposed"
    return (
        f"{_duration((taken.tokens or 1e6) * taken.per_token / rate)}{amount} on {machine.devices} x {machine.name} at {share:.0%} of the "
        f"products just measured, a share that is {basis}; at most {needed / GIB:.1f} of {machine.memory / GIB:.1f} GiB"
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    return f"{seconds / 60:,.0f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:,.1f} hours"


def _other_teacher(stage: Distill, name: str, config: PreTrainedConfig) -> tuple[PreTrainedConfig, int]:
    """A stage's own teacher and its parameters. Raises ValueError where it counts other tokens than the student and may not."""
    found = teacher_config(resolve_model(name))
    if stage.match == "tokens" and found.vocab_size != config.vocab_size:
        raise ValueError(
            f"student and teacher must share a vocabulary, got {config.vocab_size} tokens in the student and {found.vocab_size} in {name}"
            f"; {SPANS_INSTEAD}"
        )
    with torch.device("meta"):
        return found, numel(AutoModelForCausalLM.from_config(found))


def _compared(stage: Distill, name: str, teacher: PreTrainedConfig, recipe: Recipe, config: PreTrainedConfig) -> str:
    """By what a teacher is compared that may count other tokens, as far as sizes and the tokenizers at hand tell."""
    if stage.match == "tokens":
        return ""
    student, other = resolve_model(recipe.teacher), resolve_model(name)
    at_hand = Path(student).exists() and Path(other).exists()
    if vocabularies_differ(student, other) if at_hand else teacher.vocab_size != config.vocab_size:
        return f"; it counts other tokens: spans of text at temperature {stage.span_temperature:g}, and its time is a guess"
    return "; it counts the same tokens, which are compared" + ("" if at_hand else ", if its tokenizer is the same, too")


def _cut(config: PreTrainedConfig, head: int) -> int:
    """Parameters that a head pruned to `head` tokens saves; a tied one becomes a matrix of its own."""
    return config.hidden_size * ((0 if config.tie_word_embeddings else config.vocab_size) - head)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3f} M"


def _signed(count: int) -> str:
    return f"{count / 1e6:+,.3f} M"


def _tokens(stage: Training, length: int) -> str:
    per_step = sequences(stage) * length
    if stage.tokens is not None:
        return f"{stage.tokens:,} tokens = {-(-stage.tokens // per_step):,} steps of {sequences(stage)} x {length:,}"
    if stage.steps is not None:
        return f"{stage.steps:,} steps of {sequences(stage)} x {length:,} = at most {stage.steps * per_step:,} tokens"
    return f"{stage.epochs:g} epoch(s) of the data (counted when they are read), steps of {sequences(stage)} x {length:,}"


def plan(recipe: Recipe, machine: Machine | None = None) -> Plan:
    """The plan of a recipe; with a machine, its time there. Raises ValueError for an unknown teacher or values out of range."""
    teacher: Any = teacher_config(resolve_model(recipe.teacher))
    config = student_config(teacher, recipe.student.mixer, layers_of(recipe.student.attention), recipe.student.options)
    return Plan(recipe, teacher, config, count(teacher, config), machine)


def plan_here(recipe: Recipe) -> Plan:
    """The plan of a recipe on this machine, whose products are measured for two seconds where the recipe trains."""
    made = plan(recipe)
    trained = [stage.precision for stage in recipe.stages if isinstance(stage, Training) and not stage.skip]
    return replace(made, machine=measured(made.teacher, trained)) if trained else made
