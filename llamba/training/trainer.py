"""The trainer of all distillation stages: Hugging Face's, with a teacher, a loss on hidden states, and safe checkpoints."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from llamba.base.devices import on_cpu, processes
from llamba.data.batches import Batch, Ordered, Rows, collate
from llamba.models.documents import attend_by_document
from llamba.settings import Training
from llamba.training import checkpoints, frozen
from llamba.training.layer_distances import Distances
from llamba.training.learnable import by_rate
from llamba.training.losses import IGNORE, Sums
from llamba.training.metrics import LAYERS, METRICS, Metrics, append_metrics, read_metrics
from llamba.training.reporters import reporters
from llamba.training.wrapped_forward import run_as_forward

Objective = Callable[[PreTrainedModel, Any, Batch], Sums | Distances]  # student, teacher (or None), batch

CALMER = "lower lr or clip, or use precision=fp32, with a new output folder"
# transformers 5.23 renamed the argument; 5.17 knows only the old name
CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
)
_NO_DECAY = ("A_log", "D", "dt_bias", "bias")


def accumulation(stage: Training) -> int:
    """Forward passes per process and optimizer step. Raises ValueError where `batch` does not divide."""
    at_once = stage.micro_batch * processes()
    if stage.batch % at_once:
        raise ValueError(
            f"{stage.name}.batch must be a multiple of micro_batch x processes = {stage.micro_batch} x {processes()}, got {stage.batch}"
        )
    return stage.batch // at_once


def schedule(stage: Training, steps: int) -> dict[str, Any]:
    """The stage's learning rate over its optimizer steps, as arguments of the Trainer."""
    if stage.schedule == "wsd":
        fall = {"num_decay_steps": round(stage.decay * steps), "decay_type": "linear", "min_lr_ratio": stage.floor}
        return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": fall}
    if stage.schedule == "cosine" and stage.floor:
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": stage.floor}}
    return {"lr_scheduler_type": {"constant": "constant_with_warmup"}.get(stage.schedule, stage.schedule)}


def training_arguments(
    stage: Training, steps: int, seed: int, folder: Path, kind: type[TrainingArguments] = TrainingArguments, **more: Any
) -> Any:
    """The stage of `steps` optimizer steps in the Trainer's words; checkpoints go to `folder`.

    `kind` is the arguments' class, `more` what it takes beyond the Trainer's. Raises ValueError where `batch` does not
    divide.
    """
    renamed: dict[str, Any] = {CHECKPOINTING: stage.gradient_checkpointing}
    args = kind(
        output_dir=str(folder),
        seed=seed,
        per_device_train_batch_size=stage.micro_batch,
        gradient_accumulation_steps=accumulation(stage),
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=stage.lr,
        **schedule(stage, steps),
        warmup_steps=stage.warmup,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.clip,
        bf16=stage.precision == "bf16",
        **renamed,
        save_steps=stage.save_every,
        logging_steps=stage.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu(),
        disable_tqdm=True,
        report_to=reporters(stage.report_to, folder.parent),
        run_name=f"{folder.parent.parent.name}/{folder.parent.name}",
        use_cpu=on_cpu(),
        **more,
    )
    args._n_gpu = min(args.n_gpu, 1)  # one process trains on one device: never nn.DataParallel
    return args


def model_inputs(batch: Batch) -> Batch:
    """What a model's forward pass takes of a batch."""
    return {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether no process has whole weights (FSDP, ZeRO-3)."""
    kind = accelerator.distributed_type
    return kind == DistributedType.FSDP or (kind == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3)


def keeps_weights_whole(accelerator: Accelerator) -> bool:
    """Whether every process has whole weights that nothing but the optimizer touches: one process, or DDP."""
    kinds = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    return accelerator.distributed_type in kinds


def _whole(teacher: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """A quantised teacher, which was loaded to its device. Raises ValueError where weights are sharded."""
    if shards_weights(accelerator):
        raise ValueError("teacher_bits keeps a whole teacher on each device and needs one process, DDP or ZeRO-2, got sharded weights")
    return teacher


def place_teacher(teacher: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """The teacher in evaluation mode where the student trains: whole on each device, or its layers sharded with the student's."""
    teacher.requires_grad_(False).eval()
    if getattr(teacher, "is_quantized", False):
        return _whole(teacher, accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3:
        import deepspeed

        config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
        for training_only in ("optimizer", "scheduler"):
            config.pop(training_only, None)
        config["zero_optimization"].pop("offload_optimizer", None)
        engine, *_ = deepspeed.initialize(model=teacher, config=config)
        return engine.module.eval()
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.fsdp import fully_shard

        if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:  # then only the first process has read the teacher
            raise ValueError("fsdp_cpu_ram_efficient_loading must be false in the accelerate configuration, got true")
        teacher.to(accelerator.device)
        layers: Any = teacher.base_model.layers
        for layer in layers:  # each a root of its own; embeddings and head stay whole, tied or not
            fully_shard(layer)
        return teacher
    return teacher.to(accelerator.device)


class StageTrainer(Trainer):
    """The Trainer of every stage: decays matrices only, and leaves complete checkpoints with finite weights.

    A subclass sets `student`, `rates` (learning rates of single parameters, see `other_rates`) and `folder` (of the checkpoints).
    """

    student: Any  # a PreTrainedModel, or peft's wrapper of one
    rates: dict[str, float]
    folder: Path

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices only: no biases, norms, `A_log`, `D`."""
        # under ZeRO-3 a weight is an empty shard and ds_shape its true shape
        shapes = {name: getattr(weight, "ds_shape", weight.shape) for name, weight in model.named_parameters()}
        matrices = [name for name, shape in shapes.items() if len(shape) >= 2]
        return [name for name in matrices if name.rpartition(".")[2] not in _NO_DECAY and "norm" not in name]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, its groups split where parameters have a learning rate of their own."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new and self.rates:
            rates = {id(weight): self.rates[name] for name, weight in self.student.named_parameters() if name in self.rates}
            optimizer.param_groups[:] = [part for group in optimizer.param_groups for part in by_rate(group, rates)]
        return optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A complete checkpoint, or an error and the last complete one untouched."""
        target = self.folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.require_room(self.folder, checkpoints.bytes_of(self.student))
        self._require_finite_weights()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.mark_complete(target)

    def _require_finite_weights(self) -> None:
        trained = ((name, weight) for name, weight in self.student.named_parameters() if weight.requires_grad)
        broken = [name for name, weight in trained if not torch.isfinite(weight).all()]
        if broken:
            raise ValueError(
                f"weights must be finite, got NaN or infinity in {broken[0]} and {len(broken) - 1} more at step {self.state.global_step}; "
                f"{checkpoints.last_complete(self.folder)}; {CALMER}"
            )


class DistillTrainer(StageTrainer):
    """Trains a student against a teacher. `objective(student, teacher, batch)` returns sums over the batch's target tokens.

    The loss is the sum divided by the target tokens of the whole optimizer step, over all forward passes and processes.
    With `mean_of_means` each forward pass counts alike, whatever its number of targets, as in published code.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        objective: Objective,
        args: TrainingArguments,
        rows: Ordered,
        metrics: Path,
        rates: dict[str, float] | None = None,
        mean_of_means: bool = False,
    ) -> None:
        pad = student.config.pad_token_id or 0  # padding is masked, so any id will do
        super().__init__(student, args, partial(collate, pad=pad), rows, callbacks=[Metrics(metrics, rows)])
        self.pop_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count target tokens
        self.sums_of: Objective = objective
        self.student, self.rates = student, rates or {}
        self.folder = Path(args.output_dir or "")
        self.mean_of_means = mean_of_means
        self.teacher = teacher if teacher is None else place_teacher(teacher, self.accelerator)
        self.lowered = self._save_work()
        self._names: tuple[str, ...] = ()  # of the objective's sums
        self._logged: Tensor | float = 0.0  # sums since the last log
        self._step: Tensor | float = 0.0  # sums of this optimizer step

    def _save_work(self) -> frozen.Lowered | None:
        """Frozen weights in the numbers that are computed in, and once for both models, where every process has them whole."""
        models = [self.student] if self.teacher is None else [self.student, self.teacher]
        for model in models:
            attend_by_document(model)
        if not keeps_weights_whole(self.accelerator):
            return None
        lowered = None
        if self.args.bf16:
            lowered = frozen.Lowered(self.student, Path(self.student.name_or_path))
            if self.teacher is not None:
                frozen.lower(self.teacher)
        if self.teacher is not None:
            frozen.share(self.student, self.teacher)
        return lowered

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The model as it is to be read again: frozen weights as they were."""
        with nullcontext() if self.lowered is None else self.lowered.undone():
            super()._save(output_dir, state_dict)

    def _sums(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, with gradient, and all sums of the objective in one vector, in the order of `_names`."""
        student = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            sums = run_as_forward(model, student, partial(self.sums_of, student, self.teacher), batch)
        named = sums._asdict()
        named |= {f"{LAYERS}{number}": value for number, value in named.pop("layers", {}).items()}
        self._names = tuple(named)
        return sums.loss, torch.stack([value.detach().float() for value in named.values()])

    def _means(self, sums: Tensor | float) -> dict[str, float]:
        """Sums by name, as means over target tokens."""
        assert isinstance(sums, Tensor), "sums are read after a forward pass"
        values = dict(zip(self._names, sums.tolist(), strict=True))
        targets = values.pop("targets")
        return {name: value / targets if targets else math.nan for name, value in values.items()}

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """This forward pass's part of the step's mean, times the processes over which gradients are averaged."""
        loss, sums = self._sums(model, inputs)
        self._step += sums
        if self.mean_of_means:
            return loss / sums[self._names.index("targets")].clamp_min(1) / self.args.gradient_accumulation_steps
        return loss * self.accelerator.num_processes / num_items_in_batch

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward. Raises ValueError, on all processes alike and before the optimizer steps, if the loss is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            total = self.accelerator.reduce(self._step, "sum")
            self._logged += total
            self._step = 0.0
            self._require_finite(self._means(total))
        return loss

    def _require_finite(self, means: dict[str, float]) -> None:
        if not math.isfinite(means["loss"]):
            parts = ", ".join(f"{name} {value}" for name, value in means.items() if name != "loss" and not name.startswith(LAYERS))
            broken = [name.removeprefix(LAYERS) for name, value in means.items() if name.startswith(LAYERS) and not math.isfinite(value)]
            raise ValueError(
                f"the loss must be finite, got {means['loss']} ({parts or 'in layers ' + ', '.join(broken)}) at step "
                f"{self.state.global_step + 1}; {checkpoints.last_complete(self.folder)}; {CALMER}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The loss and its parts as means over the target tokens since the last log, of all processes."""
        if "loss" in logs:
            logs |= self._means(self._logged)
            self._logged = 0.0
        super().log(logs, start_time)

    @torch.no_grad()
    def held_out(self, rows: Rows) -> dict[str, float]:
        """The means of `log` on held-out rows, each named eval_..., layers left out."""
        self.student.eval()
        total: Tensor | float = 0.0
        for batch in held_out_batches(self, rows):
            total += self._sums(self.model_wrapped, batch)[1]
        means = self._means(self.accelerator.reduce(total, "sum"))
        return {f"eval_{name}": value for name, value in means.items() if not name.startswith(LAYERS)}


def held_out_batches(trainer: StageTrainer, rows: Rows) -> Iterator[Batch]:
    """This process's share of held-out rows, in the same number of batches on every process; a spare one has no targets."""
    size, accelerator = trainer.args.per_device_train_batch_size, trainer.accelerator
    for start in range(0, len(rows), size * accelerator.num_processes):
        first = start + size * accelerator.process_index
        own = [rows[index] for index in range(first, min(first + size, len(rows)))]
        batch = collate(own or [rows[0]], 0)
        if not own:  # every process takes part in every forward pass
            batch["labels"].fill_(IGNORE)
        yield trainer._prepare_inputs(batch)


def train_and_save(trainer: StageTrainer, out: Path, score: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Train from the newest complete checkpoint on, score, and leave the model in `out`.

    Returns the last line of `out/metrics.jsonl`, the scores on held-out rows, and how many processes trained.
    """
    if trainer.args.should_save:
        checkpoints.remove_incomplete(trainer.folder)
    found = checkpoints.complete(trainer.folder)
    if found:
        checkpoints.require_whole(found[-1], {name for name, weight in trainer.student.named_parameters() if weight.requires_grad})
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    last = (read_metrics(out / METRICS) or [{}])[-1]
    scores = score()
    trainer.save_model(str(out))
    if trainer.args.should_save:
        (out / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
        if scores:
            append_metrics(out / METRICS, {"step": trainer.state.global_step, **scores})
    trainer.accelerator.wait_for_everyone()
    return {**last, **scores, "processes": trainer.accelerator.num_processes}
