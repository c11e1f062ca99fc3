"""What the layers of a transformer see and do in one forward pass: residual stream, attention's output, queries and keys.

Shapes: B batch, T time, I rows asked for, D model width, H query heads, G key/value heads, P head width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llamba.models.mixers import Mixing, Recurrence
from llamba.models.mixers.parts import at_least_fp32

CAPTURED = "llamba_captured"  # the name of sdpa with a callback, among transformers' implementations of attention


@dataclass
class Scores:
    """What attention's probabilities are made of: queries [B, H, T, P] and keys [B, G, T, P] (normed and rotated), scale and window."""

    queries: Tensor
    keys: Tensor
    scale: float
    window: int | None

    def mixing(self, rec: Recurrence) -> Mixing:
        """Softmax attention as a mixing matrix; window W: token i sees the W latest, itself among them."""
        H, G = self.queries.shape[1], self.keys.shape[1]
        keys = self.keys.repeat_interleave(H // G, 1)
        return Mixing((self.queries, keys), partial(_attention_rows, self.scale, self.window, rec))


def _attention_rows(scale: float, window: int | None, rec: Recurrence, inputs: Sequence[Tensor], rows: slice | Tensor) -> Tensor:
    queries, keys = inputs
    index = torch.arange(keys.shape[2], device=keys.device)
    gap = index[rows][:, None] - index  # [I, T]
    seen = ((gap >= 0) if window is None else (gap >= 0) & (gap < window))[None]
    if rec.seq_idx is not None:
        seen = seen & (rec.seq_idx[:, rows, None] == rec.seq_idx[:, None])
    if rec.mask is not None:
        seen = seen & rec.mask[:, rows, None] & rec.mask[:, None]
    scores = at_least_fp32(queries[:, :, rows] @ keys.mT) * scale
    hidden = ~seen[:, None]  # [B or 1, 1, I, T]
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0)


_CALLBACK: ContextVar[Callable[[nn.Module, Scores], None] | None] = ContextVar("callback", default=None)


def _captured_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    callback = _CALLBACK.get()
    if callback is not None:
        callback(module, Scores(query, key, kwargs["scaling"], kwargs.get("sliding_window")))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(CAPTURED, _captured_attention)
AttentionMaskInterface.register(CAPTURED, sdpa_mask)


@contextmanager
def capturing_attention(callback: Callable[[nn.Module, Scores], None]) -> Iterator[None]:
    """Within it, `callback(module, scores)` is called with every attention of models whose implementation is `CAPTURED`."""
    token = _CALLBACK.set(callback)
    try:
        yield
    finally:
        _CALLBACK.reset(token)


@dataclass
class Activations:
    """Of one forward pass: the residual stream before each layer and, last, after all of them, before the final norm; and, of the
    layers asked for, attention's output [B, T, D] and its scores."""

    streams: list[Tensor] = field(default_factory=list)
    mixed: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Scores] = field(default_factory=dict)


@torch.no_grad()
def capture(model: Any, inputs: dict[str, Any], *, mixed: Sequence[int] = (), scores: Sequence[int] = ()) -> Activations:
    """Run the model's base on `inputs` and keep what its layers saw and did.

    Scores need `model.set_attn_implementation(CAPTURED)` before. Everything is kept in the model's own dtype, whole rows of queries and
    keys and no matrix.
    """
    made, layers = Activations(), list(model.base_model.layers)
    hooks = [layer.register_forward_pre_hook(partial(_before, made), with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda module, args, out: made.streams.append(_first(out))))
    for index in mixed:
        hooks.append(layers[index].self_attn.register_forward_hook(partial(_after_mixer, made, index)))
    wanted = {layers[index].self_attn: index for index in scores}

    def take(module: nn.Module, found: Scores) -> None:
        if module in wanted:
            made.scores[wanted[module]] = found

    try:
        with capturing_attention(take):
            model.base_model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    assert set(made.scores) == set(scores), "attention is read through transformers' attention interface"
    return made


def input_of_layer(model: Any, layer: int, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
    """What `run` returns, and what enters the model's `layer` [B, T, D] meanwhile; None where layer 0 is asked for."""
    if layer == 0:
        return run(), None
    made = Activations()
    hook = model.base_model.layers[layer].register_forward_pre_hook(partial(_before, made), with_kwargs=True)
    try:
        return run(), made.streams[0]
    finally:
        hook.remove()


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _before(made: Activations, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    made.streams.append(args[0] if args else kwargs["hidden_states"])


def _after_mixer(made: Activations, index: int, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    made.mixed[index] = _first(out)
