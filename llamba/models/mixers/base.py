"""What every mixer shares: the call that stands where attention's stood, with a cache and without.

Shapes: B batch, T time, D model width, H query heads, G key/value heads, P head width, N state width.
A mixer stands where `self_attn` stood: V -> x, K -> B, Q -> C, O -> out_proj (Mamba-in-Llama, arXiv 2408.15237, Algorithm 1).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llamba.models.cache import SteppedLayer
from llamba.models.mixers.cached import Cached
from llamba.models.mixers.outline import Recurrence


class Mixer(Cached):
    """A recurrent layer with the call and the return of a Hugging Face attention module."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Recurrence | None = None,
        past_key_values=None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, D] -> ([B, T, D], None). `attention_mask` is a `Recurrence`; other attention arguments do not apply.

        position_embeddings: cosines and sines [B or 1, T, Q] of the tokens' positions, of which Q <= P coordinates of a head are turned.
        Raises ValueError where a mixer with window, sinks or rotation gets none.
        """
        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        if isinstance(layer, SteppedLayer):
            return self.out_proj(layer.run(self, hidden_states)), None
        rec = attention_mask or Recurrence()
        parts = self._project(hidden_states) | self._angles(position_embeddings, *hidden_states.shape[:2])
        view = None
        if layer is None:
            y, _, _ = self._run(parts, rec, None, None)
        elif hidden_states.shape[1] == 1 and rec.mask is None and layer.state is not None and not layer.is_recording:
            y, view = self._cached_step(parts, layer)
        else:
            y = self._cached_run(parts, rec, layer)
        y = self._gated(y, parts["z"])
        if self.sight is not None:
            y = self._joined(y, self._look(parts, rec, layer) if view is None else view, parts["rest"])
        elif self.recurrence_off:
            y = torch.zeros_like(y)
        return self.out_proj(y.to(hidden_states.dtype)), None


def drop_window(model: nn.Module, share: float) -> None:
    """Let this share of sequences do without what window and sinks see while the model is trained."""
    for module in model.modules():
        if isinstance(module, Mixer):
            module.drop_window = share


@contextmanager
def without_recurrence(model: nn.Module) -> Iterator[None]:
    """Within, the model's mixers give what their window and sinks see, and nothing where they have none."""
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    before = [mixer.recurrence_off for mixer in mixers]
    for mixer in mixers:
        mixer.recurrence_off = True
    try:
        yield
    finally:
        for mixer, off in zip(mixers, before, strict=True):
            mixer.recurrence_off = off
