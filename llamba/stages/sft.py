"""Supervised fine-tuning through TRL's SFTTrainer (Mamba-in-Llama, section 2.7 of its recipe: 2e-5, 64 x 2,048 tokens, one epoch)."""

from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from llamba.data.batches import Batch, Ordered, Rows, collate
from llamba.data.tokens import StageData
from llamba.models.loading import load_tokenizer
from llamba.settings import Sft
from llamba.training.metrics import METRICS, Metrics
from llamba.training.trainer import held_out_batches, train_and_save, training_arguments
from llamba.training.trl_trainers import Aligner, load_student


class SftStage(Aligner, SFTTrainer):
    """TRL's trainer on rows that are tokenised and, where the data say so, packed.

    Packed documents are told apart by `position_ids` that restart, which reset attention, state and convolution.
    """

    @torch.no_grad()
    def held_out(self, rows: Rows | None) -> dict[str, float]:
        """Mean cross-entropy (nats per target token) and share of target tokens that come first, on held-out rows."""
        if rows is None:
            return {}
        self.student.eval()
        sums = torch.zeros(3, device=self.args.device)
        for batch in held_out_batches(self, rows):
            sums += self._sums(batch)
        loss, right, targets = self.accelerator.reduce(sums, "sum").tolist()
        return {"eval_loss": loss / targets, "eval_mean_token_accuracy": right / targets}

    def _sums(self, batch: Batch) -> torch.Tensor:
        with self.accelerator.autocast():
            found = self.model_wrapped(**batch, use_cache=False, fused_lm_head=True)
        return torch.stack([-found.log_probs.sum(), found.is_top1.sum(), found.label_mask.sum()]).float()


def trainer_of(stage: Sft, student: str, data: StageData, out: Path) -> SftStage:
    """The stage's trainer, ready to train the model folder `student`."""
    rows = data.rows("train")
    assert rows is not None
    ordered = Ordered(rows, stage.batch, data.seed, epochs=stage.epochs, steps=stage.steps, tokens=stage.tokens)
    only = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}  # TRL is to leave the rows as they are
    args = training_arguments(stage, ordered.steps, data.seed, out / "checkpoints", SFTConfig, **only)
    model, peft_config = load_student(stage, student)
    args.use_cache = model.config.use_cache
    trainer = SftStage(
        model,
        args,
        partial(collate, pad=model.config.pad_token_id or 0),
        Dataset.from_list([{"input_ids": ordered[0]["input_ids"].tolist(), "labels": ordered[0]["labels"].tolist()}]),
        processing_class=load_tokenizer(student),
        callbacks=[Metrics(out / METRICS, ordered)],
        peft_config=peft_config,
    )
    trainer.begin(stage, student, ordered, None)
    return trainer


def run(stage: Sft, student: str, teacher: str, data: StageData, out: Path) -> dict[str, float]:
    """Fine-tune the model folder `student`, leaving the result in `out`; the teacher has no part in it.

    An interrupted run is resumed from its newest complete checkpoint, in `out/checkpoints`. Returns the last line of
    `out/metrics.jsonl`, the scores on held-out rows, and how many processes trained. Raises ValueError for a loss that is
    not finite, a full disk, and LoRA where it cannot be used.
    """
    trainer = trainer_of(stage, student, data, out)
    return train_and_save(trainer, out, lambda: trainer.held_out(data.rows("eval")))
