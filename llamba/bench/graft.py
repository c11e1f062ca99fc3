"""A target with which a draft agrees as often as is wanted, without any training.

The target takes the draft's embedding, norm, head and layers, which stand where it keeps attention. What its other layers add to the
hidden states is scaled by s: with s = 0 it says what the draft says, and bisection finds the s with the wanted agreement. Every layer
costs what it costs in a trained model.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamba.models.draft import chosen_layers
from llamba.models.hybrid import RECURRENT
from llamba.speculative import generate

WRITES = ("self_attn.o_proj.weight", "self_attn.out_proj.weight", "mlp.down_proj.weight")  # what a layer adds to the hidden states
SMALLEST, LARGEST, STEPS = 1e-4, 10.0, 12  # of s


def can_graft(target: Any, draft: Any) -> bool:
    """Whether the draft's layers fit into the target: one width, one vocabulary, and attention layers enough."""
    kept = sum(kind != RECURRENT for kind in target.config.layer_types)
    same = (target.config.hidden_size, target.config.vocab_size) == (draft.config.hidden_size, draft.config.vocab_size)
    return same and kept >= draft.config.num_hidden_layers


@dataclass
class Graft:
    """A target that holds its draft. `writes`: the weights of its other layers, each with the values that it has at s = 1."""

    target: Any
    draft: Any
    writes: list[tuple[Tensor, Tensor]]

    def scale(self, s: float) -> None:
        """Let the other layers contribute s times what they did."""
        for weight, whole in self.writes:
            weight.data.copy_(whole * s)

    def agreement(self, prompt: list[int], tokens: int) -> float:
        """Share of the target's next `tokens` tokens that the draft would have said in its place."""
        ids = torch.tensor([prompt], device=self.target.device)
        said = generate(self.target, ids, max_new_tokens=tokens, eos_token_id=None).sequences
        with torch.inference_mode():
            drafted = self.draft(said[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].argmax(-1)
        return (drafted == said[0, len(prompt) :]).double().mean().item()

    def tune(self, wanted: float, prompt: list[int], tokens: int) -> float:
        """Set s so that the agreement behind `prompt` comes as close to `wanted` as bisection of log s finds; returns the agreement."""
        low, high, tried = SMALLEST, LARGEST, list[tuple[float, float, float]]()
        for _ in range(STEPS):
            s = (low * high) ** 0.5
            self.scale(s)
            found = self.agreement(prompt, tokens)
            tried.append((abs(found - wanted), s, found))
            low, high = (s, high) if found > wanted else (low, s)
        _, s, found = min(tried)
        self.scale(s)
        return found


def graft(target: Any, draft: Any) -> Graft:
    """Put the draft's weights into the target, its layers evenly spaced over the attention layers, the first and the last among them."""
    kept = [index for index, kind in enumerate(target.config.layer_types) if kind != RECURRENT]
    places = [kept[place] for place in chosen_layers(draft.config.num_hidden_layers, len(kept))]
    for place, layer in zip(places, draft.model.layers, strict=True):
        target.model.layers[place].load_state_dict(layer.state_dict())
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        target.get_submodule(name).load_state_dict(draft.get_submodule(name).state_dict())
    others = [layer for index, layer in enumerate(target.model.layers) if index not in places]
    writes = [(weight, weight.detach().clone()) for layer in others for name, weight in layer.named_parameters() if name in WRITES]
    assert len(writes) == 2 * len(others), "every layer writes twice"
    return Graft(target, draft, writes)
