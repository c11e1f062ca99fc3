"""Sequence classifiers over hybrids, and TRL's reward trainer on them; paged batches are refused in a sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import TEACHERS, ids, student
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from llamba.models.convert import convert


def classifier(folder: Path, labels: int = 1) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)


@torch.no_grad()
@pytest.mark.parametrize("name", TEACHERS)
def test_every_family_scores_the_last_real_token(name: str, tmp_path: Path) -> None:
    """Of the student's own hidden states; whatever stands beside a row; and the same after saving."""
    model = student(name=name, dtype=torch.float32)
    model.save_pretrained(tmp_path / "student")
    made = classifier(tmp_path / "student", labels=3)
    row, other = ids(1, 9), ids(1, 5, seed=1)
    hidden = model.base_model(row).last_hidden_state[:, -1]
    assert torch.allclose(made(row).logits, made.score(hidden), atol=1e-5)
    both, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    both[0], both[1, :5], mask[0], mask[1, :5] = row[0], other[0], 1, 1
    alone = torch.cat((made(row).logits, made(other).logits))
    assert torch.allclose(made(both, attention_mask=mask).logits, alone, atol=1e-5)
    made.save_pretrained(tmp_path / "reward")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert torch.equal(again(row).logits, made(row).logits) and again.config.num_labels == 3
    narrow = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.bfloat16)
    wide = {kind for kind, weight in narrow.named_parameters() if weight.dtype == torch.float32}
    assert {kind.rpartition(".")[2] for kind in wide} == {"A_log", "D", "dt_bias"}


@pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning")  # TRL's own old name
@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_trls_reward_trainer_learns_what_is_preferred(mixer: str, tmp_path: Path, small) -> None:
    """Answers that end in one word are preferred to those that end in another; every mixer's weights change."""
    tokenizer = small.tokenizer()
    convert(small.llama(len(tokenizer)), mixer=mixer, attention=0.5).save_pretrained(tmp_path / "student")
    rows = [{"chosen": f"the {word} sings", "rejected": f"the {word} sleeps"} for word in "cat dog bird tree house big small red".split()]
    settings = RewardConfig(
        output_dir=str(tmp_path / "out"), max_steps=24, per_device_train_batch_size=4, learning_rate=3e-3, report_to=[], save_strategy="no",
        logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=0,
    )  # fmt: skip
    model = classifier(tmp_path / "student")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer = RewardTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert {name for name in before if "self_attn" in name or "score" in name} <= changed


def test_paged_batches_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="generate_batch pages keys and values, of which recurrent layers have none; use model.generate"):
        student(dtype=torch.float32).generate_batch([[3, 4, 5]])
