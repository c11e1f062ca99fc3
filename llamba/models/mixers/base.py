"""What every mixer shares: the way through it, with a cache and without.

Shapes: B batch, T time, D model width, H query heads, G key/value heads, P head width, N state width, W convolution width.
A mixer stands where `self_attn` stood: V -> x, K -> B, Q -> C, O -> out_proj (Mamba-in-Llama, arXiv 2408.15237, Algorithm 1).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamba.kernels.conv1d import causal_conv1d, causal_conv1d_span, causal_conv1d_step
from llamba.kernels.gated_norm import gated_head_norm
from llamba.kernels.window import Sight, turned, turned_each, window_attention, window_rows
from llamba.models.cache import KEPT, RecurrentLayer, SteppedLayer, columns, write
from llamba.models.mixers.config import MixerConfig, sight_of
from llamba.models.mixers.parts import CausalConv, GatedHeadNorm, QKNorm
from llamba.models.tree import Tree

OPEN_GATE = 1.2784645427610738  # SiLU(OPEN_GATE) = 1
FP32_PARAMETERS = ("A_log", "D", "dt_bias", "erase_bias", "trap_bias", "theta_log")


class Recurrence(NamedTuple):
    """What a mixer receives as its `attention_mask`: real tokens [B, T] bool and document numbers [B, T]; None = all real, one document.

    `tree`, with a cache that records: the tokens are its last T nodes, and the nodes before those were read last.
    """

    mask: Tensor | None = None
    seq_idx: Tensor | None = None
    tree: Tree | None = None


class Mixing(NamedTuple):
    """A mixing matrix M (y = M x for each head) that is not written out.

    `rows(inputs, index)` gives the rows [B, H, I, T] of M that `index` (a slice or [I] integers) names, differentiable in the
    inputs. Every input is [B, H, ...], the part of one head of one sequence.
    """

    inputs: tuple[Tensor, ...]
    rows: Callable[[Sequence[Tensor], slice | Tensor], Tensor]


def _both_rows(
    own: Callable[[Sequence[Tensor], slice | Tensor], Tensor], sight: Sight, scale: float, rec: Recurrence, inputs: Sequence[Tensor],
    rows: slice | Tensor,
) -> Tensor:  # fmt: skip
    q, k = (heads.transpose(1, 2) for heads in inputs[:2])
    return own(inputs[2:], rows) + window_rows(q, k, sight, scale, rec.seq_idx, rec.mask, rows)


class Mixer(nn.Module):
    """A recurrent layer with the call and the return of a Hugging Face attention module.

    Subclasses say how the rows of `in_proj` are laid out (`rows`), which of them the convolution covers (`conv_channels`), how
    its output becomes heads (`heads_of`), and the recurrence itself (`scan` over a sequence, `step` for one token).
    """

    matrix_parts: ClassVar[tuple[str, ...]] = ("in_proj", "conv1d", "dt_bias", "A_log", "D", "q_norm", "k_norm")  # what M depends on
    reads_heads: ClassVar[bool] = True  # B and C are whole key and query heads (N = P), which can be turned and seen through a window
    has_skip: ClassVar[bool] = True  # D
    erases: ClassVar[bool] = False  # by a gate with a bias of its own, `erase_bias`
    projects_steps: ClassVar[bool] = False  # from the dt rows, by `dt_proj`
    turns: ClassVar[bool] = False  # keys and queries by angles of its own
    fold_after = 16  # settled tokens that are replayed from the cache before they are folded into the state
    dt_bias: nn.Parameter
    D: nn.Parameter
    A_log: nn.Parameter  # not in discrete Mamba-2
    erase_bias: nn.Parameter  # in the delta rules
    trap_bias: nn.Parameter  # in Mamba-3, as the next three
    theta_log: nn.Parameter
    B_bias: nn.Parameter
    C_bias: nn.Parameter
    dt_proj: nn.Linear  # in Mamba-1
    in_proj: nn.Linear
    conv1d: CausalConv
    out_proj: nn.Linear
    norm: GatedHeadNorm | None
    join: nn.Parameter | None  # of a mixer with a window and without a norm: what the recurrence's channels count
    drop_window = 0.0  # share of sequences that do without the window in training
    recurrence_off = False

    @classmethod
    def defaults(cls, shape: dict[str, Any]) -> dict[str, Any]:
        """The mixer's own values of its configuration for attention of this shape; a user's options come over them."""
        return {"state": shape["head_dim"]}

    def __init__(self, config: MixerConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.sight = sight_of(config, layer_idx)
        if (config.rotary or self.sight) and not (self.reads_heads and config.state == config.head_dim):
            raise ValueError(
                f"mixer.window, mixer.sinks and mixer.rotary need keys and queries of whole heads (state = head_dim = {config.head_dim}); "
                f"got {config.kind} with state {config.state}"
            )
        self.in_proj = nn.Linear(config.hidden_size, sum(self.layout().values()), bias=config.proj_bias)
        self.conv1d = CausalConv(self.conv_channels(), config.conv_width)
        self.out_proj = nn.Linear(config.inner, config.hidden_size, bias=config.out_bias)
        self.norm = GatedHeadNorm(config.inner, config.norm_eps) if config.out_norm else None
        self.join = nn.Parameter(torch.zeros(config.inner)) if self.sight and not config.out_norm else None
        if config.qk_norm is not None:
            self.q_norm = QKNorm(config.qk_norm, config.head_dim, config.qk_norm_eps)
            self.k_norm = QKNorm(config.qk_norm, config.head_dim, config.qk_norm_eps)

    @property
    def gain(self) -> tuple[str, nn.Parameter | None]:
        """What the recurrence's channels count behind the gate: the parameter's name, and itself where the mixer has it."""
        return ("join", self.join) if self.norm is None else ("norm.weight", self.norm.weight)

    def rows(self) -> dict[str, int]:
        """Rows of in_proj by name, in order; "x", "B" and "C" hold the teacher's V, K and Q."""
        raise NotImplementedError

    def layout(self) -> dict[str, int]:
        """`rows`, and beside a window "mass", one row for each head."""
        return self.rows() | ({"mass": self.config.heads} if self.sight else {})

    def conv_channels(self) -> int:
        """Channels of the convolution."""
        raise NotImplementedError

    def conv_rows(self) -> tuple[str, ...]:
        """Names of the in_proj rows that pass the convolution; they stand next to each other."""
        raise NotImplementedError

    def heads_of(self, conv_out: Tensor, rest: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x, B (both as the cache stores them) and C for every head, from the convolution's output and the other rows."""
        raise NotImplementedError

    def scan(self, x: Tensor, b: Tensor, c: Tensor | None, dt: Tensor, state: Tensor | None, rec: Recurrence) -> tuple[Tensor, Tensor]:
        """The recurrence over a sequence: output [B, T, H, P] and final state. c None: only the state is wanted."""
        raise NotImplementedError

    def step(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The recurrence for one token: inputs without the time axis, output [B, H, P] and next state."""
        raise NotImplementedError

    def mixing(self, hidden_states: Tensor, rec: Recurrence, angles: tuple[Tensor, Tensor] | None = None) -> Mixing:
        """The mixing matrix from x to y for inputs [B, T, D]; norm, gate and out_proj stand outside. What a window sees is added to it.

        `angles`: `position_embeddings` as `forward` takes them.

        Raises ValueError for a mixer that has no matrix per head.
        """
        raise ValueError(
            f"the matrix stage needs a mixer with one mixing matrix per head, got mixer={self.config.kind!r}, which mixes every channel in "
            "its own way; use the hidden stage, which aligns the mixer's output instead"
        )

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
        seen = None
        if layer is None:
            y, _, _ = self._run(parts, rec, None, None)
        elif hidden_states.shape[1] == 1 and rec.mask is None and layer.state is not None and not layer.is_recording:
            y, seen = self._cached_step(parts, layer)
        else:
            y = self._cached_run(parts, rec, layer)
        y = self._gated(y, parts["z"])
        if self.sight is not None:
            y = self._joined(y, self._look(parts, rec, layer) if seen is None else seen, parts["mass"])
        elif self.recurrence_off:
            y = torch.zeros_like(y)
        return self.out_proj(y.to(hidden_states.dtype)), None

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate and norm: [B, T, H, P], [B, T, H P] -> [B, T, H P]."""
        return self.norm(y, z) if self.norm is not None else y.flatten(-2) * F.silu(z)

    def sides(self, hidden_states: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What the join puts together, and what it should give: the part of attention that window and sinks see (zeros without them), the
        recurrence behind the gate with weights of 1, and attention over all tokens of the document. All [B, T, H, P], from [B, T, D]."""
        turns = {name: part.expand(*hidden_states.shape[:2], -1) for name, part in zip(("cos", "sin"), angles, strict=True)}
        parts = self._project(hidden_states) | turns
        y = self._run(parts, Recurrence(), None, None)[0]
        ones = y.new_ones(self.config.inner)
        y = y.flatten(-2) * F.silu(parts["z"]) if self.norm is None else gated_head_norm(y, parts["z"], ones, self.norm.eps)
        heads, scale = self.attention_heads(parts), self.config.head_dim**-0.5
        reach = self.config.sliding_window if self.layer_idx in (self.config.sliding_layers or ()) else None
        whole = window_attention(*heads, Sight(hidden_states.shape[1] if reach is None else reach, 0, reach), scale=scale)
        seen = torch.zeros_like(whole) if self.sight is None else window_attention(*heads, self.sight, scale=scale)
        return seen, y.unflatten(-1, (-1, self.config.head_dim)), whole

    def _joined(self, recurrent: Tensor, seen: Tensor, mass: Tensor) -> Tensor:
        """(1 - mass) seen + recurrent: recurrent [B, T, H P] behind norm and gate, seen [B, T, H, P], mass [B, T, H] -> [B, T, H P].

        `mass` stands for the part of softmax's mass that lies on what window and sinks do not see. It starts at 0, as the recurrence's
        weights behind the gate do. Both are trained; without the recurrence nothing is taken from what is seen.
        """
        if self.recurrence_off:
            return seen.flatten(-2)
        seen = torch.addcmul(seen, seen, mass.unsqueeze(-1), value=-1).flatten(-2)
        if self.training and self.drop_window:
            kept = torch.rand(len(seen), 1, 1, device=seen.device) >= self.drop_window
            seen = seen * kept.to(seen.dtype)
        return seen + (recurrent if self.join is None else recurrent * self.join)

    def _angles(self, given: tuple[Tensor, Tensor] | None, rows: int, tokens: int) -> dict[str, Tensor]:
        """Cosines and sines of the tokens' positions, where the mixer turns its heads, for every row: [B, T, Q]."""
        if self.sight is None and not self.config.rotary:
            return {}
        if given is None:
            raise ValueError(
                "a mixer with window, sinks or rotary needs position_embeddings, as the model's own layers pass them; got none"
            )
        turns = zip(("cos", "sin"), given, strict=True)
        return {name: part if part.shape[0] == rows else part.expand(rows, tokens, -1) for name, part in turns}

    def attention_heads(self, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's queries [B, T, H, P], keys and values [B, T, G, P], the first two turned: the rows before the convolution."""
        v, both = self._attention_rows(parts["conv"])
        k, q = turned(both, parts["cos"], parts["sin"]).to(v.dtype).split_with_sizes([self.config.groups, self.config.heads], -2)
        return q, k, v  # under autocast the angles are wider

    def _attention_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Values [..., G, P], and keys and queries [..., G + H, P], of the rows that pass the convolution."""
        assert self.conv_rows() == ("x", "B", "C"), "of a mixer that reads whole heads"
        c = self.config
        v, both = rows.view(*rows.shape[:-1], -1, c.head_dim).split_with_sizes([c.groups, c.groups + c.heads], -2)
        return v, both

    def _look(self, parts: dict[str, Tensor], rec: Recurrence, layer: RecurrentLayer | None) -> Tensor:
        """What attention sees [B, T, H, P] of the last tokens and the first ones."""
        assert self.sight is not None
        q, k, v = self.attention_heads(parts)
        scale = self.config.head_dim**-0.5
        if layer is None:
            return window_attention(q, k, v, self.sight, scale=scale, seq_idx=rec.seq_idx, mask=rec.mask)
        return layer.look(q, k, v, self.sight, scale, rec.mask, rec.tree)

    def _with_window(self, own: Mixing, parts: dict[str, Tensor], rec: Recurrence) -> Mixing:
        """The recurrence's matrix and that of the window and the sinks, added."""
        assert self.sight is not None
        q, k, _ = self.attention_heads(parts)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)  # [B, T, H, P]
        rows = partial(_both_rows, own.rows, self.sight, self.config.head_dim**-0.5, rec)
        return Mixing((q.transpose(1, 2), k.transpose(1, 2), *own.inputs), rows)

    def _project(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """The rows of in_proj by name; those that pass the convolution stay together under "conv"."""
        merged: dict[str, int] = {}
        for name, count in self.layout().items():
            key = "conv" if name in self.conv_rows() else name
            merged[key] = merged.get(key, 0) + count
        parts = dict(zip(merged, self.in_proj(hidden_states).split_with_sizes(list(merged.values()), -1), strict=True))
        return parts if self.config.qk_norm is None else self._normalise(parts)

    def _split(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows by name, also those that pass the convolution."""
        together = self.conv_rows()
        return dict(zip(together, parts["conv"].split([self.rows()[name] for name in together], -1), strict=True)) | parts

    def _normalise(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's norms over the heads of B and C, wherever they stand."""
        together, rows = self.conv_rows(), self._split(parts)
        for name, norm in (("B", self.k_norm), ("C", self.q_norm)):
            rows[name] = norm(rows[name].unflatten(-1, (-1, len(norm.weight)))).flatten(-2)
        return rows | {"conv": torch.cat([rows[name] for name in together], -1)}

    def _conv_in(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["conv"]

    def _convolve(self, parts: dict[str, Tensor], rec: Recurrence, window: Tensor | None) -> tuple[Tensor, Tensor]:
        how = {"state": window, "seq_idx": rec.seq_idx, "mask": rec.mask}
        return self.conv1d(self._conv_in(parts), causal_conv1d, activation=self.config.conv_activation, **how)

    def _turned_heads(self, conv_out: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """`heads_of`, B and C turned by their positions where the mixer says so."""
        x, b, c = self.heads_of(conv_out, parts)
        if not self.config.rotary:
            return x, b, c
        cos, sin = parts["cos"], parts["sin"]
        return x, turned(b, cos, sin), turned(c, cos, sin)

    def _run(self, parts: dict[str, Tensor], rec: Recurrence, window: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output, state and convolution window after the tokens."""
        conv_out, window = self._convolve(parts, rec, window)
        x, b, c = self._turned_heads(conv_out, parts)
        y, state = self.scan(x, b, c, parts["dt"], state, rec)
        return y, state, window

    def _cached_run(self, parts: dict[str, Tensor], rec: Recurrence, layer: RecurrentLayer) -> Tensor:
        tokens = parts["conv"].shape[1]
        recent = min(tokens, KEPT) if layer.is_recording else 0
        done = []
        if recent < tokens:
            early = {name: part[:, : tokens - recent] for name, part in parts.items()}
            layer.fold_all(self._advance)
            done.append(self._folded_run(early, Recurrence(None if rec.mask is None else rec.mask[:, : tokens - recent]), layer))
        if recent:
            late = {name: part[:, tokens - recent :] for name, part in parts.items()}
            mask = None if rec.mask is None else rec.mask[:, tokens - recent :]
            done.append(self._held_run(late, layer, rec.tree) if mask is None else self._held_run_with_holes(late, mask, layer))
        return done[0] if len(done) == 1 else torch.cat(done, 1)

    def _held_run_with_holes(self, parts: dict[str, Tensor], mask: Tensor, layer: RecurrentLayer) -> Tensor:
        """As `_held_run` for tokens of which some are absent: they stand behind the others, and are forgotten."""
        order = (~mask).long().argsort(dim=1, stable=True)  # [B, T]
        packed = {name: part.gather(1, order[..., None].expand_as(part)) for name, part in parts.items()}
        y = self._held_run(packed, layer, None)
        layer.skip(mask)
        there = order.argsort(1)[..., None, None].expand_as(y)
        return y.gather(1, there).masked_fill(~mask[..., None, None], 0)

    def _folded_run(self, parts: dict[str, Tensor], rec: Recurrence, layer: RecurrentLayer) -> Tensor:
        y, state, window = self._run(parts, rec, layer.window(), layer.state)
        layer.set_state(window, state, y.shape[1])
        return y

    def _held_run(self, parts: dict[str, Tensor], layer: RecurrentLayer, tree: Tree | None) -> Tensor:
        tokens = parts["conv"].shape[1]
        behind = 0 if tree is None else len(tree) - tokens
        span = layer.append_conv(self._conv_in(parts), self._advance, self.fold_after, behind)
        windows = None if tree is None else tree.windows(self.config.conv_width)[behind:]
        conv_out = self.conv1d(span, causal_conv1d_span, activation=self.config.conv_activation, windows=windows)
        x, b, c = self._turned_heads(conv_out, parts)
        return self.append_inputs(x, b, c, parts["dt"], layer, tree)

    def append_inputs(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, layer: RecurrentLayer, tree: Tree | None) -> Tensor:
        """Output [B, T, H, P] of new tokens, whose inputs the cache holds from now on; `tree`: they are its last T nodes."""
        inputs, firsts = layer.append_inputs((x, b, dt))
        return self.resume(inputs, c, layer.state, firsts, tree)

    def resume(self, inputs: tuple[Tensor, ...], c: Tensor, state: Tensor | None, firsts: list[int], tree: Tree | None = None) -> Tensor:
        """Output [B, T, H, P] of the tokens that stand in slots firsts[b] .. firsts[b] + T - 1.

        `inputs`: x, B and dt of the slots [B, S, ...] in order; c [B, T, ...] of the tokens; `state` before slot 0. What stands behind a
        row's tokens is garbage and changes nothing. `tree`: the tokens are its last T nodes; one state for each node is made on the way.
        """
        x, b, dt = inputs
        if tree is not None:
            return self._resume_tree(inputs, c, state, [first - len(tree) + c.shape[1] for first in firsts], tree)
        read = c.new_zeros(x.shape[0], x.shape[1], *c.shape[2:])
        write(read, firsts, c)
        return columns(self.scan(x, b, read, dt, state, Recurrence())[0], firsts, c.shape[1])

    def _resume_tree(self, inputs: tuple[Tensor, ...], c: Tensor, state: Tensor | None, roots: list[int], tree: Tree) -> Tensor:
        """`resume` by one step for each node, from the state of its parent; row b's root stands in slot roots[b]."""
        slots = torch.arange(inputs[0].shape[1], device=c.device)
        states = [self._advance(inputs, slots < torch.tensor(roots, device=c.device)[:, None], state)]  # that before the root, then theirs
        x, b, dt = (columns(held, roots, len(tree)) for held in inputs)
        read = torch.cat((c.new_zeros(len(c), len(tree) - c.shape[1], *c.shape[2:]), c), 1)
        outputs = []
        for node, parent in enumerate(tree.parents):
            y, after = self.step(x[:, node], b[:, node], read[:, node], dt[:, node], states[parent + 1])
            states.append(after)
            outputs.append(y)
        return torch.stack(outputs[-c.shape[1] :], 1)

    def _cached_step(self, parts: dict[str, Tensor], layer: RecurrentLayer) -> tuple[Tensor, Tensor | None]:
        """Of one token: the recurrence's output, and what attention sees where there is a window; both [B, 1, H, P]."""
        window = layer.window()
        assert window is not None and layer.state is not None, "a layer with a state has a window"
        rest = {name: part.select(1, 0) for name, part in parts.items() if name not in ("z", "mass", "cos", "sin")}
        conv_out, window = self.conv1d(self._conv_in(rest), causal_conv1d_step, activation=self.config.conv_activation, state=window)
        x, b, c = self.heads_of(conv_out, rest)
        b, c, seen = self._step_heads(b, c, rest["conv"], parts, layer)
        y, state = self.step(x, b, c, rest["dt"], layer.state)
        layer.set_state(window, state, 1)
        return y.unsqueeze(1), seen

    def _step_heads(
        self, b: Tensor, c: Tensor, rows: Tensor, parts: dict[str, Tensor], layer: RecurrentLayer
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """B and C of one token turned, and what its attention sees [B, 1, H, P]: in one turn, as a call costs more than its arithmetic.

        `rows`: those before the convolution, without the time axis.
        """
        parted, seen = [b, c] if self.config.rotary else [], None
        if self.sight is not None:
            v, both = self._attention_rows(rows)
            parted.append(both)
        if not parted:
            return b, c, None
        every = turned_each(torch.cat(parted, 1), parts["cos"], parts["sin"])  # [B, 1, Q]
        made = every.split_with_sizes([heads.shape[1] for heads in parted], 1)
        if self.sight is not None:
            k, q = made[-1].to(v.dtype).split_with_sizes([self.config.groups, self.config.heads], 1)
            seen = layer.look_once(q, k, v, self.sight, self.config.head_dim**-0.5)
        return (made[0], made[1], seen) if self.config.rotary else (b, c, seen)

    def _advance(self, inputs: tuple[Tensor, ...], mask: Tensor | None, state: Tensor | None) -> Tensor:
        x, b, dt = inputs
        return self.scan(x, b, None, dt, state, Recurrence(mask))[1]

    def _apply(self, fn, recurse: bool = True):
        """Casting a model to 16 bit leaves A_log, D and the step bias in fp32 (they decide the decay over thousands of tokens)."""
        wide = {name: value.data for name, value in self._parameters.items() if name in FP32_PARAMETERS and value is not None}
        super()._apply(fn, recurse)
        for name, old in wide.items():
            new = self.get_parameter(name)
            if new.dtype in (torch.bfloat16, torch.float16):
                new.data = old.to(new.device, torch.float32)
        return self


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
