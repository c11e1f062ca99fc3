"""What a recipe would do: layers, parameters, tokens, memory, hours. Counts on the meta device; needs neither weights nor network."""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from llamba.base.folders import resolve_model
from llamba.models.convert import student_config
from llamba.models.draft import draft_config
from llamba.models.families import family_of
from llamba.models.hybrid import RECURRENT, mixer_layers
from llamba.models.mixers import ATTENTION, build_mixer
from llamba.models.published import teacher_config
from llamba.settings import Aligning, Attention, Distill, Dpo, Draft, Lora, PseudoLabel, Recipe, Select, Stage, Training, layers_of

GIB = 2**30
PEAK_FLOPS = 989e12  # dense bf16 of one H100 or H200
UTILISATION = 0.4
NF4_BITS = 4.127  # per weight, with the scales of blocks of 64 (doubly quantised; arXiv 2305.14314, section 3)


@dataclass(frozen=True)
class Counts:
    """Parameters: of the whole student, its mixers and MLPs, of the teacher, and of one converted layer, ours and published."""

    student: int
    mixers: int
    mlps: int
    teacher: int
    attention: int
    published: dict[str, int]
    own: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """A recipe's plan; `str` gives the text that `--plan` prints. `config` is the first student's."""

    recipe: Recipe
    teacher: PreTrainedConfig
    config: PreTrainedConfig
    counts: Counts

    @property
    def kept(self) -> list[int]:
        """Layers that keep attention in the first student."""
        return _kept(self.config)

    def __str__(self) -> str:
        student = self.recipe.student
        lines = [
            f"teacher   {self.recipe.teacher}",
            f"student   {_mixer(self.config)}, init {student.init}, {self.config.num_hidden_layers} layers",
        ]
        lines += [_layers(self.config, student.attention), *_parameters(self.counts)]
        config, counts = self.config, self.counts
        for number, stage in enumerate(self.recipe.stages, 1):
            if stage.skip:
                lines.append(f"stage {number}   {stage.name}: left out")
                continue
            if stage.attention is not None:
                config = student_config(config, student.mixer, layers_of(stage.attention), student.options)
                counts = count(self.teacher, config)
                lines.append(f"then      {_layers(config, stage.attention)}")
            lines += _stage(self.recipe, number, stage, config, counts)
            if isinstance(stage, Select):  # which layers is not known yet, but how many
                config = student_config(self.teacher, student.mixer, stage.keep, student.options)
                counts = count(self.teacher, config)
                lines.append(f"    attention back in {len(_kept(config))} of {config.num_hidden_layers} layers, those that measure best")
        return "\n".join(lines)


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


def _stage(recipe: Recipe, number: int, stage: Stage, config: PreTrainedConfig, counts: Counts) -> list[str]:
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
    if isinstance(stage, Distill) and stage.teacher is not None:
        counts = replace(counts, teacher=_other_teacher(stage.teacher, config))
    length = (stage.data or recipe.data).length
    trainable = {"mixers": counts.mixers, "all": counts.student, "all_but_mlps": counts.student - counts.mlps}[stage.train]
    lora = stage.lora if isinstance(stage, Aligning) else None
    held, how = 4.0 * counts.student, str(stage.train)
    if lora is not None:
        trainable, held = _adapted(config, counts, stage, lora)
        how += f", LoRA of rank {lora.rank}"
    lines = [f"stage {number}   {stage.name}: trains {_millions(trainable)} ({how}), {_tokens(stage, length)}"]
    processes = int(os.environ.get("WORLD_SIZE", "0")) or 8
    memory = {"student": held} | _memory(config, counts, stage, trainable, length)
    total = sum(memory.values())
    lines.append("    memory per GPU, nothing sharded: " + ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.items()))
    sharded = memory["activations"] + (total - memory["activations"]) / processes
    shares = "" if lora else f"; sharded over {processes} GPUs (ZeRO-3, FSDP2): {sharded / GIB:.1f} GiB"
    lines.append(f"    = {total / GIB:.1f} GiB (DDP){shares}")
    budget = _budget(stage, length)
    if isinstance(stage, Distill) and stage.offline:
        teacher = counts.teacher * _teacher_bytes(stage) / GIB
        lines.append(f"    before it the teacher ({teacher:.1f} GiB) runs once: {8 * stage.offline + 4:,} bytes on disk for each target")
    per_token = _flops_per_token(config, counts, trainable, length, stage.gradient_checkpointing, _is_taught(stage))
    hours = (budget or 1e9) * per_token / (processes * PEAK_FLOPS * UTILISATION) / 3600
    amount = "" if budget else " per 1,000,000,000 tokens"
    lines.append(f"    {hours:.1f} hours{amount} on {processes} H100 at {UTILISATION:.0%} of peak (an estimate from arithmetic alone)")
    return lines


def _other_teacher(name: str, config: PreTrainedConfig) -> int:
    """Parameters of a stage's own teacher. Raises ValueError where its vocabulary is not the student's."""
    found = teacher_config(resolve_model(name))
    if found.vocab_size != config.vocab_size:
        raise ValueError(
            f"student and teacher must share a vocabulary, got {config.vocab_size} tokens in the student and {found.vocab_size} in {name}"
        )
    with torch.device("meta"):
        return _numel(AutoModelForCausalLM.from_config(found))


def _teacher_bytes(stage: Training) -> float:
    """Bytes per weight of a stage's teacher while it runs."""
    bits = stage.teacher_bits if isinstance(stage, Distill) else None
    return bits / 8 if bits else 2 if stage.precision == "bf16" else 4


def _cut(config: PreTrainedConfig, head: int) -> int:
    """Parameters that a head pruned to `head` tokens saves; a tied one becomes a matrix of its own."""
    return config.hidden_size * ((0 if config.tie_word_embeddings else config.vocab_size) - head)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3f} M"


def _signed(count: int) -> str:
    return f"{count / 1e6:+,.3f} M"


def _is_taught(stage: Training) -> bool:
    """Whether a second model computes beside the student while it is trained: a teacher, or a reference asked step by step."""
    return not isinstance(stage, Aligning) or (isinstance(stage, Dpo) and not stage.precompute)


def _is_own_reference(stage: Training) -> bool:
    """Whether the reference is the student without LoRA's updates."""
    return isinstance(stage, Dpo) and stage.lora is not None and stage.reference == "input"


def _sequences(stage: Training) -> int:
    """Sequences per optimizer step; a pair of answers is two."""
    return stage.batch * (2 if isinstance(stage, Dpo) else 1)


def _budget(stage: Training, length: int) -> int | None:
    if stage.tokens is not None:
        return stage.tokens
    return None if stage.steps is None else stage.steps * _sequences(stage) * length


def _tokens(stage: Training, length: int) -> str:
    per_step = _sequences(stage) * length
    if stage.tokens is not None:
        return f"{stage.tokens:,} tokens = {-(-stage.tokens // per_step):,} steps of {_sequences(stage)} x {length:,}"
    if stage.steps is not None:
        return f"{stage.steps:,} steps of {_sequences(stage)} x {length:,} = at most {stage.steps * per_step:,} tokens"
    return f"{stage.epochs:g} epoch(s) of the data (counted when they are read), steps of {_sequences(stage)} x {length:,}"


def _adapted(config: PreTrainedConfig, counts: Counts, stage: Training, lora: Lora) -> tuple[int, float]:
    """Parameters that LoRA trains, and the bytes of the student with them: frozen weights in the stage's precision or in 4 bits."""
    from llamba.training.lora import targets  # here, so that other plans need not import the trainer

    with torch.device("meta"):
        student = family_of(config).causal_lm(config)
    shapes = {name: student.get_parameter(f"{name}.weight").shape for name in targets(student, "all")}
    trained = lora.rank * sum(sum(shapes[name]) for name in targets(student, stage.train))
    quantised = sum(shape.numel() for shape in shapes.values()) if lora.bits else 0
    frozen = (counts.student - quantised) * (2 if stage.precision == "bf16" else 4) + quantised * NF4_BITS / 8
    return trained, frozen + 4 * trained


def _memory(config: PreTrainedConfig, counts: Counts, stage: Training, trainable: int, length: int) -> dict[str, float]:
    """Bytes on one GPU beside the student: fp32 gradients and two moments of what is trained, the teacher, activations."""
    tokens = stage.micro_batch * (2 if isinstance(stage, Dpo) else 1) * length
    kept_per_layer = config.hidden_size if stage.gradient_checkpointing else 14 * config.hidden_size + 3 * config.intermediate_size
    logits = 5 * min(tokens * config.vocab_size, 2**26) * 4
    kept = (isinstance(stage, Distill) and stage.offline is not None) or _is_own_reference(stage)
    return {
        "gradients": 4 * trainable,
        "moments": 8 * trainable,
        "teacher": 0 if kept or not _is_taught(stage) else _teacher_bytes(stage) * counts.teacher,
        "activations": 2 * tokens * kept_per_layer * config.num_hidden_layers + logits,
    }


def _flops_per_token(
    config: PreTrainedConfig, counts: Counts, trainable: int, length: int, checkpointing: bool, taught: bool = True
) -> float:
    """2 per weight and pass: teacher and student forward, activation gradients, weight gradients of what is trained; attention itself."""
    embedding = config.vocab_size * config.hidden_size * (0 if config.tie_word_embeddings else 1)
    attention = (
        2 * length * config.num_attention_heads * (config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads)
    )
    kept = sum(kind != RECURRENT for kind in config.layer_types)
    teacher = 2 * (counts.teacher - embedding) + attention * config.num_hidden_layers
    student = 2 * (counts.student - embedding) + attention * kept
    return teacher * taught + student * (3 if checkpointing else 2) + 2 * trainable


def _published(config: PreTrainedConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters of one mixer by name: those of the published layout, and those that we add."""
    mixer = dict(config.mixer)
    with torch.device("meta"):
        rows = build_mixer(mixer, 0).layout()
        ours = {name: value.numel() for name, value in build_mixer(mixer, 0).named_parameters()}
    own: dict[str, int] = {}
    published = {f"in_proj[{name}]": count * mixer["hidden_size"] for name, count in rows.items()}
    published |= {name: count for name, count in ours.items() if not name.startswith("in_proj")}
    if "in_proj.bias" in ours:
        gate = mixer["heads"] * mixer["head_dim"] if mixer["kind"] == "discrete_mamba2" else 0
        if gate:
            published["gate bias"] = gate
        own["in_proj.bias"] = ours["in_proj.bias"] - gate
    if mixer["kind"] == "discrete_mamba2":
        own["dt_bias"] = published.pop("dt_bias")
    for name in [name for name in published if name.startswith(("q_norm", "k_norm", "join", "in_proj[mass]")) or name == "out_proj.bias"]:
        own[name] = published.pop(name)
    return published, own


def _numel(model: torch.nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def count(teacher: PreTrainedConfig, config: PreTrainedConfig) -> Counts:
    """Parameter counts of a conversion, on the meta device."""
    with torch.device("meta"):
        every = student_config(teacher, config.mixer["kind"], 1.0)
        whole, student = family_of(teacher).causal_lm(every), family_of(config).causal_lm(config)
    attention = _numel(whole.model.layers[0].self_attn)
    mixers = sum(_numel(student.model.layers[index].self_attn) for index in mixer_layers(config))
    mlps = sum(_numel(layer.mlp) for layer in student.model.layers)
    if config.mixer["kind"] == ATTENTION:
        published = {name: value.numel() for name, value in whole.model.layers[0].self_attn.named_parameters()}
        return Counts(_numel(student), mixers, mlps, _numel(whole), attention, published, {})
    published, own = _published(config)
    return Counts(_numel(student), mixers, mlps, _numel(whole), attention, published, own)


def plan(recipe: Recipe) -> Plan:
    """The plan of a recipe. Raises ValueError for an unknown teacher or values out of range."""
    teacher: Any = teacher_config(resolve_model(recipe.teacher))
    config = student_config(teacher, recipe.student.mixer, layers_of(recipe.student.attention), recipe.student.options)
    return Plan(recipe, teacher, config, count(teacher, config))
