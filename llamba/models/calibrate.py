"""What can be fitted without gradient steps: how what a window sees and what stands for the rest make up the teacher's attention.

For each head, y = (1 - m) seen + m (g * n + c * mean) with m = sigmoid(w . u + b + a log k - lse): see `llamba.models.mixers.beside`. The
score's w, b and a come from weighted least squares on the logarithm of the softmax's denominator over what is out of sight, the weights g
and c then from least squares with m as it is, and some steps of Gauss-Newton move all of them together. A mixer without a window has g
alone, and out_proj is moved, too, so that the layer adds what the teacher's adds; beside a window it stays, for what is in sight is to
remain attention. Layer goes behind layer: a mixer's own inputs are those of the student whose layers below are fitted, and the aim is what
the teacher's layer does with its own.

Shapes: R rows of T tokens, n tokens with something out of sight, D model width, W = D + 2 features of a score, H heads, P head width,
I inputs of out_proj.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamba.base.progress import progress
from llamba.kernels.window import View
from llamba.models.layers import forwards, layer_output
from llamba.models.mixers import AUTO, BEST, MIXERS, Mixer, Origin
from llamba.models.mixers.parts import at_least_fp32
from llamba.models.offloaded import reading_device

SCORE_RIDGE = 1e-3  # of the mean square of what a coefficient stands before
RIDGE = 3e-2  # the same of weights of values
STEP_RIDGE = 0.1  # the same of a step of the score's coefficients
PROJECTION_RIDGE = 0.1  # the same of out_proj's inputs, against leaving the teacher's values
STEPS = 3  # of Gauss-Newton
Rows = Sequence[Sequence[int]] | Tensor
Angles = tuple[Tensor, Tensor]
Inputs = tuple[Tensor, Angles]  # of attention: hidden states [1, T, D], cosines and sines of their positions
Sides = tuple[View | None, Tensor]  # as `Mixer.sides` gives them
Whole = tuple[Tensor, Tensor]  # as `Mixer.whole` gives it
Fitted = dict[str, float]  # by tensor, the part of the square of its aim that is left


class _Head(NamedTuple):
    """What one head's tokens give: features [n, W], values [n, P] each, logarithms [n]."""

    features: Tensor
    seen: Tensor
    lse: Tensor
    recurrent: Tensor
    mean: Tensor
    whole: Tensor
    far: Tensor


class _Rest(NamedTuple):
    """Coefficients of one head: of the score [W], of the recurrence [P] and of the mean [P]."""

    score: Tensor
    gain: Tensor
    share: Tensor


def fit_join(mixer: Mixer, inputs: Sequence[Inputs], sides: Sequence[Sides], wholes: Sequence[Whole]) -> Fitted:
    """Fit what stands for the rest to `wholes`, the teacher's attention row by row; inputs and sides of the mixer's, by row.

    Where nothing is out of sight there is nothing to fit, and nothing to leave.
    """
    every = sum(float(whole.double().square().sum()) for whole, _ in wholes)
    if mixer.sight is None:
        return _fit_gain(mixer, _together(recurrent for _, recurrent in sides), _together(whole for whole, _ in wholes), every)
    given, scale = _gathered(inputs, sides, wholes)
    found, left = [], 0.0
    for head in range(mixer.config.heads if len(given.features) else 0):
        one = _Head(given.features, *(part[:, head] for part in given[1:]))
        rest, error = _fit_head(one)
        found.append(rest)
        left += error
    names = _write_rest(mixer, found, scale) if found else ()
    return dict.fromkeys(names, left / every)


def _gathered(inputs: Sequence[Inputs], sides: Sequence[Sides], wholes: Sequence[Whole]) -> tuple[_Head, Tensor]:
    """What all tokens give that have something out of sight, [n, H, ...] but for the features, and by what these were divided [W]."""
    parts = []
    for (hidden, _), (view, recurrent), (whole, far) in zip(inputs, sides, wholes, strict=True):
        assert view is not None and view.far is not None and view.more is not None and view.mean is not None, "of a window, without a cache"
        there = view.far[0]
        more = view.more[0, there, None].to(view.lse.dtype)
        features = torch.cat((at_least_fp32(hidden[0, there]), torch.ones_like(more), more), 1)
        mean = view.mean.repeat_interleave(recurrent.shape[2] // view.mean.shape[2], 2)
        rows = (view.seen, view.lse, recurrent, mean, whole, far)
        parts.append((features, *(at_least_fp32(row[0, there]) for row in rows)))
    features, *others = (torch.cat(part) for part in zip(*parts, strict=True))
    scale = (
        features.square().mean(0).sqrt().clamp_min(torch.finfo(features.dtype).smallest_normal) if len(features) else features.new_ones(0)
    )
    return _Head(features / scale if len(features) else features, *others), scale


def _fit_head(one: _Head) -> tuple[_Rest, float]:
    """The coefficients, and the square of what they leave."""
    mass = torch.sigmoid(one.far - one.lse)
    weight = (mass * (1 - mass)).square() * one.seen.square().sum(-1)
    weighted = one.features * weight[:, None]
    square, product = weighted.T @ one.features, weighted.T @ one.far
    score = _solved(square, product, [(slice(None), SCORE_RIDGE)])
    mass = torch.sigmoid(one.features @ score - one.lse)[:, None]
    gain, share = _weights(mass * one.recurrent, mass * one.mean, one.whole - (1 - mass) * one.seen)
    rest = _Rest(score, gain, share)
    error = float(_missing(one, rest)[0].double().square().sum())
    for _ in range(STEPS):
        moved = _stepped(one, rest)
        after = float(_missing(one, moved)[0].double().square().sum())
        if after >= error:
            break
        rest, error = moved, after
    return rest, error


def _missing(one: _Head, rest: _Rest) -> tuple[Tensor, Tensor, Tensor]:
    """Of the teacher's attention what is missing [n, P], the rest's part of the softmax [n, 1], and its value less what is seen [n, P]."""
    mass = torch.sigmoid(one.features @ rest.score - one.lse)[:, None]
    apart = one.recurrent * rest.gain + one.mean * rest.share - one.seen
    return one.whole - one.seen - mass * apart, mass, apart


def _weights(first: Tensor, second: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [P] of two values [n, P] that come closest to `aim`, channel by channel."""
    a, b, c = first.square().sum(0).double(), (first * second).sum(0).double(), second.square().sum(0).double()
    x, y = (first * aim).sum(0).double(), (second * aim).sum(0).double()
    least = torch.finfo(torch.float64).smallest_normal
    a, c = a + RIDGE * a.mean() + least, c + RIDGE * c.mean() + least
    return ((c * x - b * y) / (a * c - b * b)).to(aim), ((a * y - b * x) / (a * c - b * b)).to(aim)


def _stepped(one: _Head, rest: _Rest) -> _Rest:
    """After one step of Gauss-Newton in all coefficients."""
    missing, mass, apart = _missing(one, rest)
    slope, r, v = mass * (1 - mass) * apart, mass * one.recurrent, mass * one.mean  # of score, gain and share [n, P]
    features = one.features
    cross = torch.cat((features.T @ (slope * r), features.T @ (slope * v)), 1)  # [W, 2 P]
    score = (features * slope.square().sum(1, keepdim=True)).T @ features
    both = (r * v).sum(0).diag()
    values = torch.cat((torch.cat((r.square().sum(0).diag(), both), 1), torch.cat((both, v.square().sum(0).diag()), 1)))
    square = torch.cat((torch.cat((score, cross), 1), torch.cat((cross.T, values), 1)))
    product = torch.cat((features.T @ (slope * missing).sum(1), (r * missing).sum(0), (v * missing).sum(0)))
    W, P = len(score), r.shape[1]
    parts = [(slice(0, W), STEP_RIDGE), (slice(W, W + P), RIDGE), (slice(W + P, None), RIDGE)]
    return _Rest(*(old + move for old, move in zip(rest, _solved(square, product, parts).split([W, P, P]), strict=True)))


def _solved(square: Tensor, product: Tensor, parts: Sequence[tuple[slice, float]]) -> Tensor:
    """Of normal equations, in fp64: each part's ridge is of the mean of its diagonal."""
    made = square.double()
    for part, ridge in parts:
        diagonal = made.diagonal()[part]
        diagonal += ridge * diagonal.mean() + torch.finfo(torch.float64).smallest_normal
    return torch.linalg.solve(made, product.double()).to(product)


def _write_rest(mixer: Mixer, found: Sequence[_Rest], scale: Tensor) -> list[str]:
    """Give the mixer the fitted values; the names of the tensors."""
    scores = torch.stack([rest.score for rest in found]) / scale  # [H, W]
    mixer.in_proj.weight[-len(found) :] = scores[:, :-2].to(mixer.in_proj.weight)
    if mixer.in_proj.bias is not None:
        mixer.in_proj.bias[-len(found) :] = 0
    mixer.rest_bias.copy_(scores[:, -2])
    mixer.rest_growth.copy_(scores[:, -1])
    mixer.rest_mean.copy_(torch.cat([rest.share for rest in found]))
    name, gain = mixer.gain
    assert gain is not None, "beside a window the recurrence has weights"
    gain.copy_(torch.cat([rest.gain for rest in found]))
    return [name, "rest_bias", "rest_growth", "rest_mean", "in_proj.weight[rest]"]


def _fit_gain(mixer: Mixer, recurrent: Tensor, whole: Tensor, every: float) -> Fitted:
    """The weights behind the gate of a mixer without a window, where it has them: recurrent and whole [n, H, P]."""
    name, gain = mixer.gain
    if gain is None:
        return {}
    square, product = recurrent.square().sum(0).double(), (recurrent * whole).sum(0).double()  # [H, P]
    found = product / (square + RIDGE * square.mean(-1, keepdim=True) + torch.finfo(torch.float64).smallest_normal)
    gain.copy_(found.flatten())
    return {name: float((every - 2 * (found * product).sum() + (found.square() * square).sum()) / every)}


def _together(rows: Iterable[Tensor]) -> Tensor:
    """All tokens of rows [1, T, ...]: [n, ...], at least fp32."""
    return torch.cat([at_least_fp32(row[0]) for row in rows])


def fit_projection(mixer: Mixer, joined: Sequence[Tensor], wanted: Sequence[Tensor]) -> Fitted:
    """Move out_proj so that what it makes of `joined`, [1, T, I] a row, comes closest to `wanted`, [1, T, D], in the square."""
    given, aim = _together(joined), _together(wanted)
    missing = aim - _together(map(mixer.out_proj, joined))
    square, product = (given.T @ given).double(), (given.T @ missing).double()
    ridged = square + torch.eye(len(square)).to(square) * (PROJECTION_RIDGE * square.diagonal().mean())
    move = torch.linalg.solve(ridged, product)  # [I, D]
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
    if mixer.sight is None:
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
