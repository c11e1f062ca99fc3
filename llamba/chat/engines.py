"""What answers prompts: `engine(prompts, seed)` returns an answer per prompt. transformers always, vLLM where it is installed.

Letters: B prompts of a batch, T tokens of the longest.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from llamba.base.devices import own_device, processes
from llamba.chat.conversation import Sampling
from llamba.models.loading import load_model, located


class Answer(NamedTuple):
    """New token ids, without padding; and whether the model ended by itself or was cut off."""

    ids: list[int]
    finished: bool


Engine = Callable[[Sequence[list[int]], int], list[Answer]]


def _model(name: str) -> Any:
    """The model on this process's device; a lone process spreads it over all its devices. fp32 on a CPU, else as it was saved."""
    device = own_device()
    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    alone = processes() == 1
    if alone and device.type != "cpu" and torch.accelerator.device_count() > 1:
        return load_model(name, dtype, device_map="auto")
    return load_model(name, dtype).to(device)


def _left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T]."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], batch_first=True, padding_side="left")
    return ids.to(device), mask.to(device)


def transformers_engine(name: str, sampling: Sampling, ends: Sequence[int]) -> Engine:
    """Batches through `generate`, left-padded. `ends`: ids that end an answer. The answers depend on the batch and its seed alone."""
    model = _model(name)
    config = GenerationConfig(**sampling.arguments(), eos_token_id=list(ends), pad_token_id=ends[0])
    model.generation_config = config  # what the checkpoint brings (penalties, other sampling) does not apply

    @torch.inference_mode()
    def answer(prompts: Sequence[list[int]], seed: int) -> list[Answer]:
        ids, mask = _left_padded(prompts, model.device)
        torch.manual_seed(seed)
        rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
        return [_cut(row, ends) for row in rows]

    return answer


def _cut(row: list[int], ends: Sequence[int]) -> Answer:
    """What stands before the first end; the rest is padding."""
    last = next((place for place, token in enumerate(row) if token in ends), None)
    return Answer(row if last is None else row[:last], last is not None)


def require_vllm() -> None:
    """Raises ValueError where vLLM is not installed, and under a launcher of several processes."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("engine='vllm' needs the package vllm (pip install vllm), which is not installed; use engine='transformers'")
    if processes() > 1:
        raise ValueError("engine='vllm' uses all devices from one process; start the recipe with python, not with accelerate launch")


def vllm_engine(name: str, sampling: Sampling, ends: Sequence[int]) -> Engine:
    """vLLM, which takes every device by itself. Raises ValueError where it is not installed, and under a launcher of several processes."""
    require_vllm()
    import vllm

    model = vllm.LLM(model=located(name), tensor_parallel_size=max(1, torch.accelerator.device_count()))

    def answer(prompts: Sequence[list[int]], seed: int) -> list[Answer]:
        params = [
            vllm.SamplingParams(
                temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(ends), seed=seed + number,
            )
            for number in range(len(prompts))
        ]  # fmt: skip
        found = model.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
        return [Answer(_cut(list(one.outputs[0].token_ids), ends).ids, one.outputs[0].finish_reason == "stop") for one in found]

    return answer


ENGINES = {"transformers": transformers_engine, "vllm": vllm_engine}


def choose_engine(engine: str) -> str:
    """The name of the engine that `auto` means here: vLLM where it is installed, there is an accelerator, and one process runs."""
    if engine != "auto":
        return engine
    alone = processes() == 1
    fast = importlib.util.find_spec("vllm") is not None and own_device().type != "cpu"
    return "vllm" if fast and alone else "transformers"
