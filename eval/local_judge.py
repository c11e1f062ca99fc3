"""A Hugging Face model in this process as the judge: `--judge-url local:FOLDER`, with log-probabilities from its logits.

Shapes: B requests of a batch, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch

from llamba.eval.judge import Endpoint, Failure, Judge, Reply, Request, Transport

LOCAL = "local:"


def transport(judge: Judge) -> Transport:
    """How to reach a judge."""
    return Local(judge) if judge.url.startswith(LOCAL) else Endpoint(judge)


class Local:
    """Greedy answers of a local model, a batch at a time. Raises ValueError for a tokenizer without a chat template."""

    batch, workers = 8, 1

    def __init__(self, judge: Judge) -> None:
        from llamba.chat.conversation import load

        name = judge.url.removeprefix(LOCAL)
        self.model, self.tokenizer = load(name)
        self.name = name
        if self.tokenizer.chat_template is None:
            raise ValueError(f"a judge needs a tokenizer with a chat template; {name} has none")
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """Replies to requests; one whose prompt does not fit the model's context is a failure."""
        texts = [self.tokenizer.apply_chat_template(r.messages, tokenize=False, add_generation_prompt=True) for r in requests]
        lengths = [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        context = self.model.config.max_position_embeddings
        out: list[Reply | Failure] = [Failure(f"the prompt of {n} tokens does not fit the judge's context of {context}") for n in lengths]
        fits = [row for row, length in enumerate(lengths) if length < context]
        if fits:
            most = min(max(requests[r].parameters.get("max_tokens", 512) for r in fits), context - max(lengths[r] for r in fits))
            for row, reply in zip(fits, self._generate([texts[r] for r in fits], most), strict=True):
                out[row] = reply | {"input_tokens": lengths[row]}
        return out

    def close(self) -> None:
        """Nothing is open."""

    @torch.inference_mode()
    def _generate(self, texts: list[str], most: int) -> list[Reply]:
        batch = self.tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True).to(self.model.device)
        made = self.model.generate(
            **{k: batch[k] for k in ("input_ids", "attention_mask")}, max_new_tokens=most, do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        new = made.sequences[:, batch["input_ids"].shape[1] :]
        first = made.logits[0].float().log_softmax(-1)  # [B, V]
        return [self._reply(ids.tolist(), top) for ids, top in zip(new, first, strict=True)]

    def _reply(self, ids: list[int], first: torch.Tensor) -> Reply:
        values, tokens = first.topk(20)
        top = [{"token": self.tokenizer.decode([int(t)]), "logprob": float(v)} for v, t in zip(values, tokens, strict=True)]
        logprobs: dict[str, Any] = {"content": [{**top[0], "top_logprobs": top}]}
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        ended = [i for i, token in enumerate(ids) if token == self.tokenizer.pad_token_id]
        return {"text": text, "logprobs": logprobs, "served_by": self.name, "output_tokens": ended[0] if ended else len(ids)}
