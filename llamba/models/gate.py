"""A gate that is open without a bias: a direction in which every token's input to the mixer has nearly the same coordinate.

llama.cpp has no place for the bias of a mixer's projection, by which our start opens the gate. The inputs come from a norm and have a
mean; a row w with w . u = OPEN_GATE for the tokens u of a text opens it as well. The text is the teacher's own, sampled from nothing.

Shapes: R texts, T tokens of each, D model width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamba.models.mixers import Mixer, Origin
from llamba.models.mixers.initial import OPEN_GATE

TEXTS, LENGTH = 8, 128
RIDGE = 1e-2  # of the mean square of an input's coordinate


@torch.no_grad()
def own_text(model: PreTrainedModel, generator: torch.Generator, device: torch.device) -> Tensor:
    """TEXTS texts of LENGTH tokens [R, T] that the model makes up, at temperature 1."""
    start = model.config.to_dict().get("bos_token_id")
    vocabulary = model.config.vocab_size
    first = torch.randint(vocabulary, (TEXTS, 1), generator=generator) if start is None else torch.full((TEXTS, 1), start)
    tokens, cache = [first], None
    while len(tokens) < LENGTH:
        out = model(tokens[-1].to(device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        tokens.append(torch.multinomial(out.logits[:, -1].float().softmax(-1).cpu(), 1, generator=generator))
    return torch.cat(tokens, 1)


@torch.no_grad()
def open_directions(model: Any, layers: list[int], generator: torch.Generator, device: torch.device) -> dict[int, Tensor]:
    """For each of the layers the row w [D] (fp64) whose product with the attention's input is OPEN_GATE, as nearly as a ridge allows."""
    seen: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = positional[0] if positional else named["hidden_states"]
            seen[index] = hidden.flatten(0, 1).double().cpu()

        return hook

    was_training = model.training
    model.eval()
    tokens = own_text(model, generator, device)
    modules = {index: model.base_model.layers[index].self_attn for index in layers}
    hooks = [module.register_forward_pre_hook(keep(index), with_kwargs=True) for index, module in modules.items()]
    try:
        model(tokens.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return {index: _fitted(inputs) for index, inputs in seen.items()}


def _fitted(inputs: Tensor) -> Tensor:
    square = inputs.T @ inputs
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    return torch.linalg.solve(square, inputs.sum(0) * OPEN_GATE)


@torch.no_grad()
def open_by(mixer: Mixer, direction: Tensor, origins: list[Origin]) -> list[Origin]:
    """Give every row of the gate this direction [D], and say so in the conversion's record."""
    start = 0
    for name, count in mixer.rows().items():
        if name == "z":
            mixer.in_proj.weight[start : start + count] = direction.to(mixer.in_proj.weight)
        start += count
    said = f"new: open gate on {TEXTS} x {LENGTH} tokens of the teacher's own"
    return [origin._replace(source=said) if origin.tensor == "in_proj.weight[z]" else origin for origin in origins]
