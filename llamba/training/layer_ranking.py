"""Which layers should keep attention: each is scored by the KL divergence to the teacher that its attention saves.

`restore` starts from the student, every layer converted, and puts one layer's attention back: the score is the KL that goes away
(KL-guided layer selection, arXiv 2512.20569). `swap` starts from the teacher and puts one layer's mixer in: the score is the KL that
comes (single-swap scoring, as in HALO, arXiv 2601.22156). Both need one teacher and one student in memory; modules change places.

Shapes: B batch, T time, D model width, H query heads, P head width.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llamba.base.axes import scale_y
from llamba.base.progress import progress
from llamba.data.batches import Batch
from llamba.models.convert import kept_layers
from llamba.models.documents import by_document
from llamba.models.families import family_of
from llamba.models.hybrid import RECURRENT
from llamba.models.layers import forwards
from llamba.models.mixers.parts import at_least_fp32
from llamba.training.losses.fused import logits_at_once
from llamba.training.trainer import model_inputs

Method = Literal["restore", "swap"]
_HEADS_SHOWN = 10


@dataclass(frozen=True)
class Ranking:
    """Scores in nats per target token, higher = needs attention more: one per layer, and where asked one per layer and head.

    `start` is the KL of the model that scoring started from: the student for `restore`, the teacher (0) for `swap`.
    """

    method: Method
    start: float
    scores: list[float]
    heads: list[list[float]] | None
    targets: int

    def order(self) -> list[int]:
        """Layers by falling score."""
        return sorted(range(len(self.scores)), key=lambda layer: (-self.scores[layer], layer))

    def kept(self, keep: float) -> list[int]:
        """The best layers, as many as the fraction `keep` means for this model."""
        return sorted(self.order()[: len(kept_layers(keep, len(self.scores)))])

    def head_order(self) -> list[dict[str, float]]:
        """Heads by falling score."""
        found = [
            {"layer": layer, "head": head, "score": score} for layer, row in enumerate(self.heads or []) for head, score in enumerate(row)
        ]
        return sorted(found, key=lambda entry: -entry["score"])


def _layers(model: Any) -> Any:
    return model.base_model.layers


def _place(model: Any, layer: int, module: nn.Module, kind: str) -> None:
    _layers(model)[layer].self_attn = module
    model.config.layer_types[layer] = kind


@contextmanager
def swapped(host: Any, donor: Any, layers: Sequence[int]) -> Iterator[None]:
    """Within it, `host` has in `layers` what stands there in `donor`: the module itself, no copy."""
    own = [(layer, _layers(host)[layer].self_attn, host.config.layer_types[layer]) for layer in layers]
    for layer in layers:
        _place(host, layer, _layers(donor)[layer].self_attn, donor.config.layer_types[layer])
    try:
        yield
    finally:
        for layer, module, kind in own:
            _place(host, layer, module, kind)


def restore(student: Any, teacher: Any, layers: Sequence[int]) -> None:
    """Give the student the teacher's attention in `layers`, for good. Both are hybrids of one shape; the modules are shared."""
    for layer in layers:
        _place(student, layer, _layers(teacher)[layer].self_attn, teacher.config.layer_types[layer])


def _hidden(model: Any, batch: Batch) -> Tensor:
    """Last hidden states [B, T, D]."""
    hidden: Tensor = model.base_model(**model_inputs(batch), **by_document(model, batch), use_cache=False).last_hidden_state
    return hidden


def _hidden_from(model: Any, batch: Batch, layer: int, state: Tensor) -> Tensor:
    """The same where the input `state` [B, T, D] of `layer` is known: the layers below are not run again."""
    with forwards(_layers(model)[:layer], lambda hidden, *args, **kwargs: state):
        return _hidden(model, batch)


def _logits(model: Any, hidden: Tensor) -> Tensor:
    """[n, V] in at least fp32."""
    return at_least_fp32(model.get_output_embeddings()(hidden))


def _layer_inputs(model: Any, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """What enters each layer, and the last hidden states."""
    inputs: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0])) for layer in _layers(model)]
    try:
        hidden = _hidden(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, hidden


def counted(labels: Tensor, per_row: int | None) -> Tensor:
    """True [B, T] at the tokens whose predictions are compared: those before a target, of each row at most `per_row`, evenly spaced."""
    chosen = nn.functional.pad(labels[:, 1:] >= 0, (0, 1))
    if per_row is None:
        return chosen
    number, total = chosen.cumsum(1), chosen.sum(1, keepdim=True)  # of each target, from 1 on
    share = number * per_row // total.clamp_min(per_row)
    return chosen & (share > (number - 1) * per_row // total.clamp_min(per_row))


class _Guide:
    """What a teacher predicts at the chosen tokens of a batch: P [n, V] in at least fp32, made once, and Σ P log P."""

    def __init__(self, logits: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
        self.parts: list[Tensor] = []
        self.negative_entropy = 0.0
        size = logits_at_once(hidden, logits(hidden[:1]).shape[-1])
        for part in hidden.split(size):
            log_p = logits(part).log_softmax(-1)
            p = log_p.exp()
            self.negative_entropy += torch.linalg.vecdot(p, log_p).double().sum().item()
            self.parts.append(p)
        self.size = size

    def kl(self, logits: Callable[[Tensor], Tensor], hidden: Tensor) -> float:
        """Σ KL(P || Q) = Σ P log P - Σ P z + Σ logsumexp z, for Q with logits z made of `hidden` [n, D]."""
        total = self.negative_entropy
        for p, part in zip(self.parts, hidden.split(self.size), strict=True):
            z = logits(part)
            total += (z.logsumexp(-1) - torch.linalg.vecdot(p, z)).double().sum().item()
        return total


class _Scorer:
    """KL sums of variants of `host`, one batch at a time. `donor` lends its layers."""

    def __init__(self, host: Any, donor: Any, teacher: Any, per_row: int | None = None) -> None:
        self.host, self.donor, self.teacher, self.per_row = host, donor, teacher, per_row

    def start(self, batch: Batch) -> float:
        """Take up a batch; returns the KL of the host as it is, summed over the counted tokens."""
        self.batch, self.chosen = batch, counted(batch["labels"], self.per_row)
        self.teacher_hidden = _Guide(partial(_logits, self.teacher), _hidden(self.teacher, batch)[self.chosen])
        self.inputs, hidden = _layer_inputs(self.host, batch)
        return self.kl(hidden)

    def kl(self, hidden: Tensor) -> float:
        """Sum over the counted tokens of KL(teacher || host with these last hidden states)."""
        return self.teacher_hidden.kl(partial(_logits, self.host), hidden[self.chosen])

    def layer(self, layer: int) -> float:
        """KL with the donor's module in one layer."""
        with swapped(self.host, self.donor, [layer]):
            return self.kl(_hidden_from(self.host, self.batch, layer, self.inputs[layer]))

    def _before_projection(self, layer: int) -> tuple[nn.Linear, Tensor]:
        """The output projection that stands in a layer of the host, and what enters it [B, T, H P]."""
        attention = _layers(self.host)[layer].self_attn
        parts = dict(attention.named_children())
        name = "out_proj" if self.host.config.layer_types[layer] == RECURRENT else family_of(self.host.config).out
        if name not in parts:
            raise ValueError(f"heads can be scored where a mixer has heads; {type(attention).__name__} in layer {layer} has none")
        seen: list[Tensor] = []
        hook = parts[name].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            _hidden_from(self.host, self.batch, layer, self.inputs[layer])
        finally:
            hook.remove()
        projection: Any = parts[name]
        return projection, seen[0]

    def heads(self, layer: int) -> list[float]:
        """KL with one head of a layer from the donor, for each head in turn."""
        own, own_y = self._before_projection(layer)
        with swapped(self.host, self.donor, [layer]):
            other, other_y = self._before_projection(layer)
        heads = self.host.config.num_attention_heads
        bias = 0 if other.bias is None else other.bias  # counted once: the host's
        found = []
        for head in range(heads):
            chosen = own_y.new_zeros(heads, own_y.shape[-1] // heads)
            chosen[head] = 1
            y = own(own_y * (1 - chosen.flatten())) + other(other_y * chosen.flatten()) - bias  # [B, T, D]
            with forwards([_layers(self.host)[layer].self_attn], lambda *args, y=y, **kwargs: (y, None)):
                found.append(self.kl(_hidden_from(self.host, self.batch, layer, self.inputs[layer])))
        return found


def _check(teacher: Any, student: Any) -> None:
    keys = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    own, other = ([getattr(model.config, key) for key in keys] for model in (student, teacher))
    if own != other:
        raise ValueError(f"selection needs the teacher that the student was made of: {', '.join(keys)} are {own}, the teacher's {other}")
    left = [layer for layer, kind in enumerate(student.config.layer_types) if kind != RECURRENT]
    if left:
        raise ValueError(f"selection needs a student with every layer converted (student.attention=0); attention is left in {left}")


@torch.inference_mode()
def rank(
    teacher: Any, student: Any, batches: Sequence[Batch], method: Method = "restore", heads: bool = False, per_row: int | None = None
) -> Ranking:
    """Score every layer, and with `heads` every query head of every layer, at all target tokens or at most `per_row` of each row.

    `teacher` is a hybrid with attention everywhere (`convert(..., attention=1.0)`), `student` the same model with mixers everywhere;
    both are left as they were. Costs about half a forward pass per layer (and head) and batch. Raises ValueError for other models.
    """
    _check(teacher, student)
    host, donor = (student, teacher) if method == "restore" else (teacher, student)
    scorer, layers = _Scorer(host, donor, teacher, per_row), range(len(_layers(host)))
    start, targets = 0.0, 0
    by_layer = torch.zeros(len(layers), dtype=torch.float64)
    by_head = torch.zeros(len(layers), host.config.num_attention_heads if heads else 0, dtype=torch.float64)
    for batch in progress(batches, f"select ({method})", "batches"):
        start += scorer.start(batch)
        targets += int(scorer.chosen.sum())
        by_layer += torch.tensor([scorer.layer(layer) for layer in layers], dtype=torch.float64)
        if heads:
            by_head += torch.tensor([scorer.heads(layer) for layer in layers], dtype=torch.float64)
    if not targets:
        raise ValueError("selection needs rows with target tokens, got none")
    sign = -1 if method == "restore" else 1
    scores, head_scores = (sign * (sums - start) / targets for sums in (by_layer, by_head))
    return Ranking(method, start / targets, scores.tolist(), head_scores.tolist() if heads else None, targets)


@torch.inference_mode()
def divergence(teacher: Any, student: Any, batches: Sequence[Batch], layers: Sequence[int], per_row: int | None = None) -> float:
    """Mean KL(teacher || student) per target token, as `rank` counts them, with the teacher's attention back in `layers`."""
    scorer, total, targets = _Scorer(student, teacher, teacher, per_row), 0.0, 0
    with swapped(student, teacher, layers):
        for batch in progress(batches, f"KL with attention in {len(layers)} layers", "batches"):
            total += scorer.start(batch)
            targets += int(scorer.chosen.sum())
    return total / targets


def save(ranking: Ranking, layers: list[int], path: Path, facts: dict[str, Any]) -> None:
    """Write `path`, a JSON object that `student.attention` accepts, and the picture beside it (.png).

    `layers` are those that keep attention; `facts` say what was measured on.
    """
    found: dict[str, Any] = {"layers": layers, "method": ranking.method, "unit": "nats per target token", "start": ranking.start}
    found |= {"scores": ranking.scores, "order": ranking.order(), "targets": ranking.targets, **facts}
    if ranking.heads is not None:
        found["heads"] = ranking.head_order()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    draw(ranking, layers, path.with_suffix(".png"))


def draw(ranking: Ranking, layers: list[int], path: Path) -> None:
    """Bars per layer on a scale that shows the small ones, those that keep attention in another colour; below them a map of the heads
    where they were scored."""
    from matplotlib.figure import Figure  # half a second, and only for pictures
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    number = len(ranking.scores)
    rows = 1 if ranking.heads is None else 2
    figure = Figure(figsize=(max(6, number / 4), 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    colours = ["tab:orange" if layer in layers else "tab:blue" for layer in range(number)]
    axes[0].bar(range(number), ranking.scores, color=colours)
    scale_y(axes[0], ranking.scores)
    if axes[0].get_yscale() == "log":
        axes[0].set_ylim(bottom=min(ranking.scores) / 2)
    what = "KL saved by one layer's attention" if ranking.method == "restore" else "KL caused by one layer's mixer"
    axes[0].set(title=what, xlabel="layer", ylabel="nats per target token")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    kinds = [Patch(color="tab:orange", label="keeps attention"), Patch(color="tab:blue", label="gets a mixer")]
    axes[0].legend(handles=kinds, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=2, frameon=False)
    if ranking.heads is not None:
        image = axes[1].imshow(list(zip(*ranking.heads, strict=True)), aspect="auto", origin="lower")
        axes[1].yaxis.set_major_locator(MaxNLocator(integer=True))
        axes[1].set(title="the same, head by head", xlabel="layer", ylabel="query head")
        figure.colorbar(image, ax=axes[1], label="nats per target token")
    figure.savefig(path, dpi=120)


def table(ranking: Ranking, layers: list[int]) -> str:
    """The ranking as text, best layer first."""
    lines = [f"{'rank':>4} {'layer':>5} {'score':>11}  (nats per target token, {ranking.method} from KL {ranking.start:.4g})"]
    for place, layer in enumerate(ranking.order(), 1):
        lines.append(f"{place:>4} {layer:>5} {ranking.scores[layer]:>11.4g}  {'keeps attention' if layer in layers else ''}".rstrip())
    if ranking.heads is not None:
        best = (f"{head['layer']}.{head['head']} ({head['score']:.3g})" for head in ranking.head_order()[:_HEADS_SHOWN])
        lines.append(f"heads that score highest, as layer.head: {', '.join(best)}")
    return "\n".join(lines)
