"""One layer of a model alone, by the model's own call: its masks, positions and norms are made as they always are.

Shapes: B batch, T time, D model width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def forwards(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, every one of `modules` computes `forward`."""
    before = [module.__dict__.get("forward") for module in modules]  # what wraps a module's own call stands there
    for module in modules:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


def layer_output(model: Any, tokens: Tensor, layer: int, state: Tensor | None) -> Tensor:
    """What `layer` makes of its input `state` [B, T, D]; for layer 0 of the embeddings of tokens [B, T], where `state` is None."""
    layers, caught = model.base_model.layers, list[Tensor]()
    hook = layers[layer].register_forward_hook(lambda module, inputs, output: caught.append(output))
    try:
        with forwards(layers[:layer], lambda *args, **kwargs: state), forwards(layers[layer + 1 :], lambda hidden, *args, **kwargs: hidden):
            model.base_model(tokens, use_cache=False)
    finally:
        hook.remove()
    return caught[0]
