"""Direct preference optimisation through TRL's DPOTrainer (arXiv 2305.18290; Mamba-in-Llama, equations 3 and 4)."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from llamba.data.batches import Batch, Ordered
from llamba.data.pairs import Pairs
from llamba.data.tokens import StageData
from llamba.models.loading import load_model, load_tokenizer, located
from llamba.settings import Dpo
from llamba.training.losses import IGNORE, head_sums
from llamba.training.metrics import METRICS, Metrics
from llamba.training.trainer import model_inputs, shards_weights, train_and_save, training_arguments
from llamba.training.trl_trainers import Aligner, load_student
from llamba.training.wrapped_forward import run_as_forward

PROBE = 16  # pairs on whose answers the KL to the reference is measured


def _hidden(model: Any, batch: Batch) -> Tensor:
    """Last hidden states [B, T, D] of a model or of a `PeftModel`."""
    inner = model.get_base_model() if is_peft_model(model) else model
    hidden: Tensor = inner.base_model(**model_inputs(batch), use_cache=False).last_hidden_state
    return hidden


class DpoStage(Aligner, DPOTrainer):
    """TRL's trainer on pairs that are tokenised already, with the reference's part done before training."""

    head: Any = None  # the reference's

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        return dataset  # `prepare_reference` does it, once for the run and for the rows that are trained on

    @torch.no_grad()
    def prepare_reference(self, stage: Dpo, rows: Pairs, used: Sequence[int], held_out: Pairs | None) -> None:
        """Take what training needs of the reference: its states on a probe and, where precomputed, its log-probabilities."""
        if not shards_weights(self.accelerator):
            self._make_probe(rows if held_out is None else held_out, range(PROBE) if held_out else used[:PROBE])
        if stage.precompute:
            self._log_probs(rows, used, self.folder / "reference-train.npy")
            if held_out is not None:
                self._log_probs(held_out, range(len(held_out)), self.folder / "reference-eval.npy")
            self.ref_model = None

    def _log_probs(self, rows: Pairs, used: Sequence[int], path: Path) -> None:
        """Fill `rows.reference`: log-probabilities [pairs, 2] of both answers, kept in `path` for a run that goes on later."""
        if not path.exists():
            subset: Any = Subset(rows, list(used))
            loader = DataLoader(subset, batch_size=self.args.per_device_train_batch_size, collate_fn=self.data_collator)
            found = []
            for batch in self.accelerator.prepare(loader):
                both = torch.stack(self.compute_ref_log_probs(self.ref_model or self.model, batch), 1)  # [pairs, 2]
                found.append(self.accelerator.gather_for_metrics(both).float().cpu())
            values = np.full((len(rows), 2), np.nan, np.float32)
            values[list(used)] = torch.cat(found).numpy()
            if self.args.should_save:
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path.with_suffix(".partial.npy"), values)
                os.replace(path.with_suffix(".partial.npy"), path)
            self.accelerator.wait_for_everyone()
        rows.reference = np.load(path)

    def _make_probe(self, rows: Pairs, used: Sequence[int]) -> None:
        """Keep the reference's last hidden states on the probe's answers, and its head."""
        pairs = [rows[index] for index in used if index < len(rows)]
        size = self.args.per_device_train_batch_size
        batches = [self._prepare_inputs(self.data_collator(pairs[start : start + size])) for start in range(0, len(pairs), size)]
        model: Any = self.ref_model or self.model
        plain = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            self.probe = [(batch, run_as_forward(model, plain, lambda batch: _hidden(plain, batch), batch)) for batch in batches]
        self.head = copy.deepcopy(plain.get_output_embeddings()).requires_grad_(False)

    @torch.no_grad()
    def _kl(self) -> float:
        """KL(student || reference) over the whole vocabulary, a mean over the probe's answer tokens, in nats."""
        plain, head, total, count = self.accelerator.unwrap_model(self.model_wrapped), self.head, 0.0, 0.0
        for batch, reference_hidden in self.probe:
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE)

            def sums(batch: Batch, reference_hidden: Tensor = reference_hidden, labels: Tensor = labels) -> Any:
                heads = plain.get_output_embeddings(), head
                return head_sums(_hidden(plain, batch), reference_hidden, *heads, labels, kl=1.0, ce=0.0, divergence="reverse_kl")

            with self.accelerator.autocast():
                found = run_as_forward(self.model_wrapped, plain, sums, batch)
            total, count = total + float(found.kl), count + float(found.targets)
        return total / count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's rewards, margins, accuracies and log-probabilities, and the KL to the reference."""
        if "loss" in logs and self.head is not None:
            logs["kl"] = self._kl()
        super().log(logs, start_time)

    def held_out(self) -> dict[str, float]:
        """Loss, rewards, margin and accuracy on held-out pairs."""
        if self.eval_dataset is None:
            return {}
        found = self.evaluate()
        return {key: value for key, value in found.items() if key == "eval_loss" or key.startswith(("eval_rewards/", "eval_logps/"))}


def reference_of(stage: Dpo, student: str, teacher: str) -> PreTrainedModel | None:
    """The reference model, or None where it is the student itself without LoRA's updates.

    Raises ValueError where its vocabulary is not the student's.
    """
    if stage.reference == "input" and stage.lora is not None:
        return None
    name = {"input": student, "teacher": teacher}.get(stage.reference) or located(stage.reference)
    model: PreTrainedModel = load_model(name, "auto" if stage.precision == "bf16" else torch.float32)
    return model.requires_grad_(False)


def trainer_of(stage: Dpo, student: str, teacher: str, data: StageData, out: Path) -> DpoStage:
    """The stage's trainer, ready to train the model folder `student`; the reference has been consulted."""
    assert data.folder is not None
    rows = Pairs(data.folder / "train")
    held_out = Pairs(data.folder / "eval") if (data.folder / "eval").is_dir() else None
    ordered = Ordered(rows, stage.batch, data.seed, epochs=stage.epochs, steps=stage.steps, tokens=stage.tokens)
    args = training_arguments(
        stage, ordered.steps, data.seed, out / "checkpoints", DPOConfig,
        beta=stage.beta, loss_type=stage.losses(), loss_weights=stage.loss_weights, label_smoothing=stage.label_smoothing,
        precompute_ref_log_probs=stage.precompute, max_length=None, prediction_loss_only=True,
        per_device_eval_batch_size=stage.micro_batch,
    )  # fmt: skip
    model, peft_config = load_student(stage, student)
    reference = reference_of(stage, student, teacher)
    if reference is not None and reference.config.vocab_size != model.config.vocab_size:
        own, other = model.config.vocab_size, reference.config.vocab_size
        raise ValueError(f"student and reference must share a vocabulary, got {own} and {other} tokens; choose another dpo.reference")
    args.use_cache = model.config.use_cache
    trainer = DpoStage(
        model,
        reference,
        args,
        train_dataset=Dataset.from_list([rows[0]]),
        processing_class=load_tokenizer(student),
        callbacks=[Metrics(out / METRICS, ordered)],
        peft_config=peft_config,
    )
    trainer.begin(stage, student, ordered, held_out)
    trainer.prepare_reference(stage, rows, np.unique(ordered.order).tolist(), held_out)
    return trainer


def run(stage: Dpo, student: str, teacher: str, data: StageData, out: Path) -> dict[str, float]:
    """Train the model folder `student` on preference pairs, leaving the result in `out`.

    An interrupted run is resumed from its newest complete checkpoint, in `out/checkpoints`. Returns the last line of
    `out/metrics.jsonl`, the scores on held-out pairs, and how many processes trained. Raises ValueError for a loss that is
    not finite, a full disk, a reference of another vocabulary, and LoRA where it cannot be used.
    """
    trainer = trainer_of(stage, student, teacher, data, out)
    return train_and_save(trainer, out, trainer.held_out)
