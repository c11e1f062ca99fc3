"""What can be fitted without gradient steps: how what a window sees and what the recurrence adds make up the teacher's whole attention.

For each head, y = seen - (w . u) seen + g * n is linear in the row w of in_proj that estimates the mass out of sight and in the weights g
behind the recurrence's gate, so both come from one least-squares fit to attention over all tokens, a layer at a time, on the teacher's own
inputs. A mixer without a window has g alone.

Shapes: R rows of T tokens, D model width, H heads, P head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamba.models.mixers import AUTO, BEST, MIXERS, Mixer, Origin
from llamba.models.mixers.parts import at_least_fp32

RIDGE = 1e-2  # of the mean square of what a coefficient stands before
Rows = Sequence[Sequence[int]] | Tensor


class JoinFit:
    """The normal equations of one layer, summed over rows."""

    def __init__(self, mixer: Mixer):
        c = mixer.config
        self.mixer, self.width = mixer, (c.hidden_size if mixer.sight else 0)
        size = self.width + c.head_dim
        self.square = torch.zeros(c.heads, size, size, dtype=torch.float64)
        self.product = torch.zeros(c.heads, size, dtype=torch.float64)
        self.left = self.before = 0.0  # squared error of what is seen alone, and of zero

    @torch.no_grad()
    def add(self, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> None:
        """A row's inputs [1, T, D], and the cosines and sines of its positions."""
        seen, recurrent, whole = (side[0] for side in self.mixer.sides(hidden, angles))  # [T, H, P]
        inputs, own, wide, missing = map(at_least_fp32, (hidden[0], recurrent, seen, whole - seen))
        self.left += missing.double().square().sum().item()
        self.before += whole.double().square().sum().item()
        split = self.width
        for head in range(own.shape[1]):
            square, product = self.square[head], self.product[head]
            n, y = own[:, head], missing[:, head]  # [T, P]
            square.diagonal()[split:] += n.square().sum(0).cpu()
            product[split:] += (n * y).sum(0).cpu()
            if split:
                s = wide[:, head]
                square[:split, :split] += ((inputs * s.square().sum(-1, keepdim=True)).T @ inputs).cpu()
                cross = -inputs.T @ (s * n)  # [D, P]
                square[:split, split:] += cross.cpu()
                square[split:, :split] += cross.T.cpu()
                product[:split] -= (inputs.T @ (s * y).sum(-1)).cpu()

    @torch.no_grad()
    def write(self) -> tuple[list[str], float]:
        """Give the mixer the fitted values; the names of the tensors, and the part of `whole` that is left unexplained."""
        solved = []
        for square, product in zip(self.square, self.product, strict=True):
            ridged = square.clone()
            for part in (slice(0, self.width), slice(self.width, None)):
                diagonal = ridged.diagonal()[part]
                diagonal += RIDGE * diagonal.mean() + torch.finfo(torch.float64).smallest_normal if len(diagonal) else 0.0
            solved.append(torch.linalg.solve(ridged, product))
        found = torch.stack(solved)  # [H, D + P]
        name, gain = self.mixer.gain
        names = []
        if gain is not None:
            gain.copy_(found[:, self.width :].flatten())
            names.append(name)
        if self.width:
            self.mixer.in_proj.weight[-len(found) :] = found[:, : self.width].to(self.mixer.in_proj.weight)
            names.append("in_proj.weight[mass]")
        error = self.left - 2 * (found * self.product).sum() + torch.einsum("hi,hij,hj->", found, self.square, found)
        return names, float(error) / self.before


def fit_joins(teacher: PreTrainedModel, student: Any, layers: Sequence[int], rows: Rows) -> dict[int, tuple[list[str], float]]:
    """Fit the joins of these layers of a fresh student on rows of token ids; by layer, what was fitted and the error that is left."""
    mixers = {index: student.base_model.layers[index].self_attn for index in layers}
    fits = {index: JoinFit(mixer) for index, mixer in mixers.items()}

    def keep(index: int) -> Any:
        def hook(module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = positional[0] if positional else named["hidden_states"]
            fits[index].add(hidden, named["position_embeddings"])

        return hook

    places: Any = teacher.base_model.layers
    was_training, device = teacher.training, next(teacher.parameters()).device
    hooks = [places[i].self_attn.register_forward_pre_hook(keep(i), with_kwargs=True) for i in layers]
    teacher.eval()
    try:
        with torch.no_grad():
            for row in rows:
                teacher(torch.as_tensor(row, device=device)[None], use_cache=False, logits_to_keep=1)
    finally:
        for one in hooks:
            one.remove()
        teacher.train(was_training)
    return {index: fit.write() for index, fit in fits.items()}


def calibrated(teacher: PreTrainedModel, student: Any, record: dict[int, list[Origin]], rows: Rows) -> dict[int, list[Origin]]:
    """Fit the joins of a fresh student's layers, and say so in its conversion's record."""
    tokens = sum(map(len, rows))
    found = fit_joins(teacher, student, list(record), rows)

    def said(index: int) -> list[Origin]:
        names, left = found[index]
        source = f"fitted on {tokens} tokens, {left:.3f} of attention's square left"
        return [one._replace(source=source) if one.tensor in names else one for one in record[index]]

    return {index: said(index) for index in record}


def check_rows(rows: Rows, config: Any, mixer: str) -> None:
    """Raises ValueError for rows that are none, or too long for the teacher, and for a mixer that does not read whole heads."""
    kind = BEST[0] if mixer == AUTO else mixer
    if kind not in MIXERS or not MIXERS[kind].reads_heads:
        raise ValueError(f"calibrate is for mixers that read whole heads; got mixer={mixer!r}, leave calibrate out")
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) < 1 or max(lengths) > config.max_position_embeddings:
        got = f"lengths from {min(lengths)} to {max(lengths)}" if lengths else "no rows"
        raise ValueError(f"calibrate needs rows of 1 to {config.max_position_embeddings} token ids, got {got}")
