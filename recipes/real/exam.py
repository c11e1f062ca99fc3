"""What `recipes/study.py` asks of every model, in bf16: distance to the teacher on held-out chats and text, recall, the better answer.

Nothing is generated but answers to GSM8K: a recalled number and a short answer are judged by their likelihood.

Shapes: T tokens of a window, V vocabulary, n tokens of an answer.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamba.eval import zero_shot
from llamba.eval.answerer import Answerer, Settings
from llamba.eval.recall import phone_book
from llamba.eval.scores import model_name, read_scores
from llamba.models.mixers import without_recurrence
from llamba.recipes.real.questions import Messages, Question

PHONE, DIGITS, PREFERRED, MATH = "phone numbers, %", "digits of them, %", "better answer, %", "GSM8K, %"


@dataclass(frozen=True)
class Size:
    """How much is asked: windows of chats and text of `length` tokens, questions, `trials` for each size of phone book."""

    chats: int = 4
    text: int = 2
    length: int = 512
    questions: int = 16
    names: tuple[int, ...] = (4, 8)
    trials: int = 6
    reasoning: int = 128  # tokens of an answer to a question of GSM8K


def _tokens(tokenizer: Any, messages: Messages, opened: bool = False) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=opened)
    return ids


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@torch.inference_mode()
def likelihoods(model: Any, tokenizer: Any, question: Question, length: int) -> list[float]:
    """Mean log-likelihood a token of each answer, in a window of `length` tokens of which the conversation before it has at most half."""
    opened, found = _tokens(tokenizer, question.prompt, opened=True), list[float]()
    for answer in question.answers:
        whole = _tokens(tokenizer, [*question.prompt, {"role": "assistant", "content": answer}])
        start = _shared(opened, whole)
        begin = max(0, start - length // 2)
        window = whole[begin : begin + length]
        logits = model(torch.tensor([window[:-1]]), use_cache=False).logits[0, start - begin - 1 :].float()  # [n, V]
        target = torch.tensor(window[start - begin :])
        found.append(float(logits.log_softmax(-1).gather(1, target[:, None]).mean()))
    return found


def preferred(model: Any, tokenizer: Any, asked: Sequence[Question], length: int) -> float:
    """Per cent of questions whose first answer is the likeliest."""
    best = [max(range(len(found)), key=found.__getitem__) for found in (likelihoods(model, tokenizer, q, length) for q in asked)]
    return 100 * sum(place == 0 for place in best) / len(best)


@torch.inference_mode()
def recalled(model: Any, tokenizer: Any, names: Sequence[int], trials: int) -> dict[str, float]:
    """Per cent of phone numbers that greedy decoding writes where "The number of NAME is " has been begun, and of their tokens.

    The tokens count one by one, those before them right: that tells what is nearly recalled from what is not at all.
    """
    found: list[Tensor] = []
    for count, trial in product(names, range(trials)):
        question, number = phone_book(count, random.Random(f"recall/{count}/{trial}"))
        who = question.rpartition("number of ")[2].partition("?")[0]
        begun = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        begun += f"The number of {who} is "
        before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (begun, begun + number))
        start = _shared(before, whole)
        likeliest = model(torch.tensor([whole[:-1]]), use_cache=False).logits[0, start - 1 :].argmax(-1)  # [n]
        found.append(likeliest == torch.tensor(whole[start:]))
    return {
        PHONE: 100 * _mean([float(right.all()) for right in found]),
        DIGITS: 100 * _mean([float(right.float().mean()) for right in found]),
    }


@torch.inference_mode()
def _log_probs(model: Any, window: Sequence[int]) -> Tensor:
    """Log-probabilities [T - 1, V] of a window's next tokens."""
    logits: Tensor = model(torch.tensor([window[:-1]]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


class Exam:
    """The questions of a study, the teacher's log-probabilities on its windows (fp16), and a model's scores.

    `windows`: equally long windows of tokens by what they are of ("chat", "text"); `asked`: questions with a better and a worse answer.
    """

    def __init__(self, teacher: str, windows: dict[str, list[list[int]]], asked: Sequence[Question], size: Size) -> None:
        self.windows, self.asked, self.size = windows, asked, size
        model = Answerer(teacher, Settings(dtype="float32")).model
        self.wanted = {name: [_log_probs(model, window).half() for window in found] for name, found in windows.items()}

    def distances(self, model: Any) -> dict[str, float]:
        """KL(teacher || model) in nats a token, over all of a window and over its second half, and perplexity, of each kind of windows."""
        found: dict[str, float] = {}
        for name, windows in self.windows.items():
            kl, nll, late = [], [], []
            for window, half in zip(windows, self.wanted[name], strict=True):
                own, wanted = _log_probs(model, window), half.float()
                divergence = (wanted.exp() * (wanted - own)).sum(-1)
                kl.append(float(divergence.mean()))
                late.append(float(divergence[len(divergence) // 2 :].mean()))
                nll.append(float(-own.gather(1, torch.tensor(window[1:])[:, None]).mean()))
            found |= {f"{name} KL": _mean(kl), f"{name} KL, second half": _mean(late), f"{name} perplexity": math.exp(_mean(nll))}
        return found

    def scores(self, folder: str, window: bool) -> tuple[dict[str, float], dict[str, float]]:
        """Everything of a model folder; and, where it has a `window` to be left alone, its distances with the recurrence off."""
        answerer = Answerer(folder, Settings(dtype="bfloat16"))
        model, tokenizer = answerer.model, answerer.tokenizer
        found = self.distances(model) | recalled(model, tokenizer, self.size.names, self.size.trials)
        found[PREFERRED] = preferred(model, tokenizer, self.asked, self.size.length)
        if not window:
            return found, {}
        with without_recurrence(model):
            return found, self.distances(model)

    def counts(self) -> dict[str, int]:
        """Questions behind each share."""
        book = len(self.size.names) * self.size.trials
        return {PHONE: book, DIGITS: book, PREFERRED: len(self.asked)}


def gsm8k(folder: str, file: Path, out: Path, limit: int, new_tokens: int) -> float:
    """Per cent of so many questions of GSM8K, from a file gsm8k/test.jsonl, that are answered rightly."""
    settings = Settings(batch=25, max_new_tokens=new_tokens, dtype="bfloat16")
    zero_shot.run(folder, out, settings, zero_shot.Options("gsm8k", str(file.parents[1]), limit))
    rows = [row for row in read_scores(out) if row["model"] == model_name(folder)]
    return float(rows[-1]["value"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
