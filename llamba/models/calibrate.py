"""What can be fitted without gradient steps: how what a window sees and what the recurrence adds make up the teacher's attention.

For each head, y = seen - (w . u) seen + g * n is linear in the row w of in_proj that estimates the mass out of sight and in the weights g
behind the recurrence's gate, so both come from one least-squares fit to attention over all tokens. A mixer without a window has g alone.
Then out_proj is moved, so that the layer adds what the teacher's adds. Layer goes behind layer: a mixer's own inputs are those of the
student whose layers below are fitted, and the aim is what the teacher's layer does with its own.

Shapes: R rows of T tokens, n tokens in all, D model width, H heads, P head width, I inputs of out_proj.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamba.base.progress import progress
from llamba.models.layers import forwards, layer_output
from llamba.models.mixers import AUTO, BEST, MIXERS, Mixer, Origin
from llamba.models.mixers.parts import at_least_fp32
from llamba.models.offloaded import reading_device

RIDGE = 3e-2  # of the mean square of what a coefficient stands before
PROJECTION_RIDGE = 0.1  # the same of out_proj's inputs, against leaving the teacher's values
Rows = Sequence[Sequence[int]] | Tensor
Angles = tuple[Tensor, Tensor]
Inputs = tuple[Tensor, Angles]  # of attention: hidden states [1, T, D], cosines and sines of their positions
Sides = tuple[Tensor, Tensor]  # as `Mixer.sides` gives them
Fitted = dict[str, float]  # by tensor, the part of the square of its aim that is left


def fit_join(mixer: Mixer, inputs: Sequence[Inputs], sides: Sequence[Sides], wholes: Sequence[Tensor]) -> Fitted:
    """Fit mass and gain to `wholes`, a row's attention over all tokens [1, T, H, P] each; inputs and sides of the mixer's, by row.

    Where nothing is out of sight there is nothing to fit, and nothing to leave.
    """
    before, width = (0 if mixer.sight is None else mixer.sight.whole), (mixer.config.hidden_size if mixer.sight else 0)
    hidden = _together(given[:, before:] for given, _ in inputs)  # [n, D]
    seen, recurrent = (_together(side[place][:, before:] for side in sides) for place in (0, 1))  # [n, H, P]
    missing = _together(whole[:, before:] for whole in wholes) - seen
    found, left = [], 0.0
    for head in range(mixer.config.heads):
        square, product = _equations(hidden[:, :width], seen[:, head], recurrent[:, head], missing[:, head])
        solved = torch.linalg.solve(_ridged(square, (slice(0, width), slice(width, None)), RIDGE), product)
        left += float(missing[:, head].double().square().sum() - 2 * solved @ product + solved @ square @ solved)
        found.append(solved)
    share = left / sum(float(whole.double().square().sum()) for whole in wholes)
    return dict.fromkeys(_write_join(mixer, torch.stack(found), width), share)


def _together(rows: Iterable[Tensor]) -> Tensor:
    """All tokens of rows [1, T, ...]: [n, ...], at least fp32."""
    return torch.cat([at_least_fp32(row[0]) for row in rows])


def _equations(hidden: Tensor, seen: Tensor, recurrent: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """One head's normal equations in fp64, [W + P, W + P] and [W + P]: hidden [n, W] of the mass, the others [n, P]."""
    cross = -hidden.T @ (seen * recurrent)  # [W, P]
    mass = (hidden * seen.square().sum(-1, keepdim=True)).T @ hidden
    top, bottom = torch.cat((mass, cross), 1), torch.cat((cross.T, recurrent.square().sum(0).diag()), 1)
    product = torch.cat((-hidden.T @ (seen * missing).sum(-1), (recurrent * missing).sum(0)))
    return torch.cat((top, bottom)).double(), product.double()


def _ridged(square: Tensor, parts: Sequence[slice], ridge: float) -> Tensor:
    made = square.clone()
    for part in parts:
        diagonal = made.diagonal()[part]
        diagonal += ridge * diagonal.mean() + torch.finfo(torch.float64).smallest_normal if len(diagonal) else 0.0
    return made


def _write_join(mixer: Mixer, found: Tensor, width: int) -> list[str]:
    """Give the mixer the fitted values [H, W + P]; the names of the tensors."""
    name, gain = mixer.gain
    names = []
    if gain is not None:
        gain.copy_(found[:, width:].flatten())
        names.append(name)
    if width:
        mixer.in_proj.weight[-len(found) :] = found[:, :width].to(mixer.in_proj.weight)
        names.append("in_proj.weight[mass]")
    return names


def fit_projection(mixer: Mixer, joined: Sequence[Tensor], wanted: Sequence[Tensor]) -> Fitted:
    """Move out_proj so that what it makes of `joined`, [1, T, I] a row, comes closest to `wanted`, [1, T, D], in the square."""
    given, aim = _together(joined), _together(wanted)
    missing = aim - _together(map(mixer.out_proj, joined))
    square, product = (given.T @ given).double(), (given.T @ missing).double()
    move = torch.linalg.solve(_ridged(square, (slice(None),), PROJECTION_RIDGE), product)  # [I, D]
    mixer.out_proj.weight += move.T.to(mixer.out_proj.weight)
    left = missing.double().square().sum() - 2 * (move * product).sum() + (move * (square @ move)).sum()
    return {"out_proj.weight": float(left / aim.double().square().sum())}


class _Stream:
    """A model's rows on their way through its layers, in one place between two layers."""

    def __init__(self, model: Any, rows: Rows, device: torch.device):
        self.model, self.layers = model, model.base_model.layers
        self.tokens = [torch.as_tensor(row, device=device)[None] for row in rows]
        self.states: list[Tensor | None] = [None] * len(self.tokens)

    def advance(self, layer: int) -> None:
        """Through the layer."""
        rows = zip(self.tokens, self.states, strict=True)
        self.states = [layer_output(self.model, tokens, layer, state) for tokens, state in rows]

    def advance_with(self, layer: int, outputs: Sequence[Tensor]) -> None:
        """Through the layer whose attention gives `outputs`, [1, T, D] a row."""
        left = iter(outputs)
        with forwards([self.layers[layer].self_attn], lambda *args, **kwargs: (next(left), None)):
            self.advance(layer)

    def inputs(self, layer: int) -> list[Inputs]:
        """What enters the layer's attention, row by row."""
        caught: list[Inputs] = []

        def keep(hidden_states: Tensor, *args: Any, position_embeddings: Angles, **kwargs: Any) -> tuple[Tensor, None]:
            caught.append((hidden_states, position_embeddings))
            return hidden_states, None

        place, before = self.layers[layer], self.states
        with forwards([place.self_attn], keep), forwards([place.mlp], lambda hidden: hidden):
            self.advance(layer)
        self.states = before
        return caught

    def advance_watched(self, layer: int) -> tuple[list[Inputs], list[Tensor]]:
        """Through the layer; what enters its attention, and what comes out of it [1, T, D]."""
        inputs: list[Inputs] = []
        outputs: list[Tensor] = []

        def enter(module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs.append((positional[0] if positional else named["hidden_states"], named["position_embeddings"]))

        attention = self.layers[layer].self_attn
        hooks = [
            attention.register_forward_pre_hook(enter, with_kwargs=True),
            attention.register_forward_hook(lambda module, given, output: outputs.append(output[0])),
        ]
        try:
            self.advance(layer)
        finally:
            for hook in hooks:
                hook.remove()
        return inputs, outputs


def fit_joins(teacher: PreTrainedModel, student: Any, layers: Sequence[int], rows: Rows) -> dict[int, Fitted]:
    """Fit these layers of a fresh student on rows of token ids; by layer, what was fitted and what is left."""
    was_training = teacher.training, student.training
    home = next(student.parameters()).device
    theirs, own = _Stream(teacher, rows, reading_device(teacher)), _Stream(student, rows, home)
    found: dict[int, Fitted] = {}
    teacher.eval()
    student.eval()
    try:
        with torch.no_grad():
            for layer in progress(range(max(layers, default=-1) + 1), "fitting", "layer"):
                inputs, outputs = theirs.advance_watched(layer)
                if layer in layers:
                    found[layer] = _fit(own, layer, inputs, [output.to(home) for output in outputs], home)
                else:
                    own.advance(layer)
    finally:
        teacher.train(was_training[0])
        student.train(was_training[1])
    return found


def _fit(own: _Stream, layer: int, theirs: Sequence[Inputs], outputs: Sequence[Tensor], home: torch.device) -> Fitted:
    """Fit a layer of the student, and take its rows through it."""
    mixer, inputs = own.layers[layer].self_attn, own.inputs(layer)
    sides = [mixer.sides(hidden, angles) for hidden, angles in inputs]
    wholes = [mixer.whole(hidden.to(home), (cos.to(home), sin.to(home))) for hidden, (cos, sin) in theirs]
    found = fit_join(mixer, inputs, sides, wholes)
    joined = [mixer.joined_sides(hidden, *side) for (hidden, _), side in zip(inputs, sides, strict=True)]
    found |= fit_projection(mixer, joined, outputs)
    own.advance_with(layer, [mixer.out_proj(row) for row in joined])
    return found


def calibrated(teacher: PreTrainedModel, student: Any, record: dict[int, list[Origin]], rows: Rows) -> dict[int, list[Origin]]:
    """Fit the joins and projections of a fresh student's layers, and say so in its conversion's record."""
    tokens = sum(map(len, rows))
    found = fit_joins(teacher, student, list(record), rows)

    def said(index: int) -> list[Origin]:
        sources = {name: f"fitted on {tokens} tokens, {left:.3f} of attention's square left" for name, left in found[index].items()}
        return [one._replace(source=sources.get(one.tensor, one.source)) for one in record[index]]

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
