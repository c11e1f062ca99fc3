"""What the stages on TRL's trainers share: the library's data, order, checkpoints, errors and metrics under TRL's losses."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback

from llamba.data.batches import Ordered
from llamba.models.loading import load_model
from llamba.settings import Aligning
from llamba.training import checkpoints, lora
from llamba.training.learnable import freeze, other_rates
from llamba.training.trainer import CALMER, StageTrainer


def load_student(stage: Aligning, folder: str) -> tuple[PreTrainedModel, Any]:
    """The model to train, and the `peft.LoraConfig` where it is trained through LoRA."""
    if stage.lora is not None:
        frozen = lora.load_frozen(folder, stage.lora, stage.precision)
        return frozen, lora.config(frozen, stage.lora, stage.train)
    student = load_model(folder, torch.float32)
    freeze(student, stage.train)
    return student, None


class Aligner(StageTrainer):
    """Mixed into a TRL trainer, before it.

    TRL wants a `datasets.Dataset` of text or tokens. The rows here are tokenised and ordered already, so the trainer is
    made with the first row alone, and `begin` gives it the others.
    """

    source: str
    lora: Any

    def __init__(self, model: PreTrainedModel, *args: Any, **more: Any) -> None:
        ids = {name: model.config.to_dict().get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        self._own = ids, copy.deepcopy(model.generation_config)
        super().__init__(model, *args, **more)

    def begin(self, stage: Aligning, source: str, rows: Ordered, held_out: Any) -> None:
        """Give the trainer its rows. `source`: the folder of the model that it was made with.

        Raises ValueError for LoRA on a model that is spread over several devices.
        """
        self.pop_callback(PrinterCallback)
        self.source, self.student = source, self.model
        self.rates = {} if stage.lora else other_rates(self.student, stage)
        self.folder = Path(self.args.output_dir or "")
        self.train_dataset, self.eval_dataset = rows, held_out
        self.lora = stage.lora
        self._step_loss = torch.zeros((), device=self.args.device)
        if stage.lora and self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError("lora is for models that fit on one device; use recipes/accelerate/ddp.yaml, or train without lora")

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward. Raises ValueError, on all processes alike and before the optimizer steps, if the loss is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss += loss.detach()
        if self.accelerator.sync_gradients:
            total = float(self.accelerator.reduce(self._step_loss, "sum"))
            self._step_loss.zero_()
            if not math.isfinite(total):
                good = checkpoints.last_complete(self.folder)
                raise ValueError(f"the loss must be finite, got {total} at step {self.state.global_step + 1}; {good}; {CALMER}")
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Checkpoints hold what is trained; the model that the stage leaves has LoRA's updates in its weights.

        It has its own special tokens again, too: trainers write the tokenizer's into it, and where that pads with its end
        token, the end token's embedding would not be trained by the next stage.
        """
        if self.lora is None or _internal_call:
            if not _internal_call:
                plain: Any = self.accelerator.unwrap_model(self.model)
                plain.config.update(self._own[0])
                plain.generation_config = self._own[1]
            return super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            lora.merged(self.accelerator.unwrap_model(self.model), self.source).save_pretrained(str(output_dir))
