"""What `recipes/study.py` asks of every model, in bf16: distance to the teacher on held-out chats and text, recall, the better answer.

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
from llamba.eval.recall import Options, measure, phone_book
from llamba.eval.scores import model_name, read_scores
from llamba.models.mixers import without_recurrence
from llamba.recipes.real.questions import Messages, Question

PHONE, DIGITS, PREFERRED = "phone numbers, %", "digits of them, %", "better answer, %"


@dataclass(frozen=True)
class Size:
    """How much is asked: windows of chats and text of `length` tokens, questions, `trials` for each size of phone book."""

    chats: int = 6
    text: int = 3
    length: int = 512
    questions: int = 40
    names: tuple[int, ...] = (4, 8)
    trials: int = 12
    new_tokens: int = 32
    reasoning: int = 200  # tokens of an answer to a question of GSM8K


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
def digits(model: Any, tokenizer: Any, names: Sequence[int], trials: int) -> float:
    """Per cent of the tokens of phone numbers that are the likeliest ones, where the answer has been begun and is right so far.

    A short answer by likelihood: it counts what is nearly recalled, which an exact answer does not.
    """
    found = []
    for count, trial in product(names, range(trials)):
        question, number = phone_book(count, random.Random(f"digits/{count}/{trial}"))
        who = question.rpartition("number of ")[2].partition("?")[0]
        begun = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        begun += f"The number of {who} is "
        before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (begun, begun + number))
        start = _shared(before, whole)
        likeliest = model(torch.tensor([whole[:-1]]), use_cache=False).logits[0, start - 1 :].argmax(-1)  # [n]
        found.append(float((likeliest == torch.tensor(whole[start:])).float().mean()))
    return 100 * _mean(found)


@torch.inference_mode()
def _log_probs(model: Any, window: Sequence[int]) -> Tensor:
    """Log-probabilities [T - 1, V] of a window's next tokens."""
    logits: Tensor = model(torch.tensor([window[:-1]]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


class Exam:
    """The questions of a study, the teacher's log-probabilities on its windows (fp16), and a model's scores.

    `windows`: equally long windows of tokens by what they are of ("chat", "text"); `asked`: questions with a better and a worse answer.
    """

    def __init__(
        self, teacher: str, windows: dict[str, list[list[int]]], asked: Sequence[Question], size: Size, math_file: Path | None
    ) -> None:
        self.windows, self.asked, self.size, self.math_file = windows, asked, size, math_file
        model = Answerer(teacher, Settings(dtype="float32")).model
        self.wanted = {name: [_log_probs(model, window).half() for window in found] for name, found in windows.items()}

    def _distances(self, model: Any) -> dict[str, float]:
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

    def scores(self, folder: str, better: bool) -> dict[str, float]:
        """Everything of a model folder; which answer it finds `better` where that is asked for."""
        answerer = self._answerer(folder, self.size.new_tokens)
        found = self._distances(answerer.model)
        options = Options(tasks=("phone",), names=self.size.names, trials=self.size.trials)
        said = [one.value for trials in measure(answerer, options)["phone"].values() for trial in trials for one in trial]
        found[PHONE] = _mean(said)
        found[DIGITS] = digits(answerer.model, answerer.tokenizer, self.size.names, self.size.trials)
        if better:
            found[PREFERRED] = preferred(answerer.model, answerer.tokenizer, self.asked, self.size.length)
        return found

    def counts(self) -> dict[str, int]:
        """Questions behind each share."""
        book = len(self.size.names) * self.size.trials
        return {PHONE: book, DIGITS: book, PREFERRED: len(self.asked)}

    def window_alone(self, folder: str) -> dict[str, float]:
        """The distances with the recurrence off."""
        model = self._answerer(folder, 1).model
        with without_recurrence(model):
            return self._distances(model)

    def gsm8k(self, folder: str, out: Path, limit: int) -> float:
        """Per cent of so many questions of GSM8K that are answered rightly."""
        assert self.math_file is not None
        settings = Settings(batch=10, max_new_tokens=self.size.reasoning, dtype="bfloat16")
        zero_shot.run(folder, out, settings, zero_shot.Options("gsm8k", str(self.math_file.parents[1]), limit))
        rows = [row for row in read_scores(out) if row["model"] == model_name(folder)]
        return float(rows[-1]["value"])

    def _answerer(self, folder: str, new_tokens: int) -> Answerer:
        return Answerer(folder, Settings(batch=self.size.trials, max_new_tokens=new_tokens, dtype="bfloat16"))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
