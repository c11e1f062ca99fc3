"""A draft for speculative decoding: made from the teacher, trained towards the student (or on the data's answers)."""

import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamba.data.batches import Batch, Rows
from llamba.data.tokens import StageData
from llamba.models.draft import make_draft
from llamba.models.hybrid import PrunedHead
from llamba.models.loading import load_model
from llamba.settings import Draft
from llamba.stages.shared import load_pair, train_student
from llamba.training.learnable import freeze
from llamba.training.losses import IGNORE, Sums, head_sums
from llamba.training.trainer import model_inputs

MADE = "untrained"
_WAIT_SECONDS = 3600  # for the one process that makes the draft


def frequent_tokens(rows: Rows, count: int, vocabulary: int) -> Tensor:
    """The `count` most frequent target tokens of the rows, in rising order; ties go to the smaller token."""
    found = np.bincount(rows.tokens[rows.targets == 1], minlength=vocabulary)
    return torch.from_numpy(np.sort(np.argsort(-found, kind="stable")[:count]))


def _make(stage: Draft, teacher: str, rows: Rows, folder: Path) -> None:
    """Leave the untrained draft in `folder`, which appears whole or not at all; the first process makes it."""
    deadline = time.monotonic() + _WAIT_SECONDS
    if int(os.environ.get("RANK", "0")) == 0 and not folder.exists():
        partial_ = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial_, ignore_errors=True)
        source: PreTrainedModel = load_model(teacher)
        tokens = None if stage.head is None else frequent_tokens(rows, stage.head, source.config.vocab_size)
        make_draft(source, stage.layers, tokens).save_pretrained(partial_)
        os.replace(partial_, folder)
    while not folder.exists():
        if time.monotonic() > deadline:
            raise ValueError(f"waited {_WAIT_SECONDS // 60} minutes for the first process to make {folder}, and it did not")
        time.sleep(0.5)


def _load(stage: Draft, made: str, student: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The draft, and the student as its target, whose head is cut to the tokens that the draft has."""
    draft, target = load_pair(stage, made, student)
    freeze(draft, stage.train)
    head = draft.get_output_embeddings()
    if isinstance(head, PrunedHead):
        whole: Any = target.get_output_embeddings()
        cut = nn.Linear(whole.in_features, len(head.tokens), bias=whole.bias is not None, dtype=whole.weight.dtype)
        cut.load_state_dict({name: value[head.tokens] for name, value in whole.state_dict().items()})
        target.config.tie_word_embeddings = False
        target.set_output_embeddings(cut)
    return draft, target


def objective(stage: Draft, draft: PreTrainedModel, target: PreTrainedModel, batch: Batch) -> Sums:
    """kl · Σ KL(student || draft) + ce · Σ CE over the batch's target tokens that the draft has."""
    hidden: Tensor = draft.base_model(**model_inputs(batch), use_cache=False).last_hidden_state
    head: Any = draft.get_output_embeddings()
    labels = head.places(batch["labels"], IGNORE) if isinstance(head, PrunedHead) else batch["labels"]
    if not stage.kl:
        return head_sums(hidden, hidden.detach(), head, head, labels, kl=0.0, ce=stage.ce)
    with torch.no_grad():
        wanted: Tensor = target.base_model(**model_inputs(batch), use_cache=False).last_hidden_state
    return head_sums(hidden, wanted, head, target.get_output_embeddings(), labels, kl=stage.kl, ce=stage.ce)


def run(stage: Draft, student: str, teacher: str, data: StageData, out: Path) -> dict[str, float]:
    """Make a draft of the model folder `teacher`, train it with the model folder `student` as its target, leave it in `out`.

    See `train_student`.
    """
    rows = data.rows("train")
    assert rows is not None
    out.mkdir(parents=True, exist_ok=True)
    _make(stage, teacher, rows, out / MADE)
    results = train_student(stage, partial(_load, stage, str(out / MADE), student), partial(objective, stage), data, out)
    if int(os.environ.get("RANK", "0")) == 0:
        shutil.rmtree(out / MADE)
    return results
