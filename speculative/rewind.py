"""A model and its cache at a place of its own in every row, from which each row can go back.

Shapes: B batch, T time of this call, G key/value heads, P head width, V vocabulary, S slots of an attention layer.
Row b's token at position p has its key and value in slot p. Going back is integer arithmetic on `lengths`; what stands behind a row's
length is masked and overwritten. Recurrent layers do the same with the inputs that they hold (`models.cache`). The nodes of a tree stand
in slots in their order, until `keep` brings a path of them to the front; their positions count from the root.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel, MistralModel, PreTrainedModel, Qwen2Model, Qwen3Model
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer

from llamba.models.cache import RecurrentLayer, check_places, gather
from llamba.models.hybrid import RECURRENT, HybridBackbone
from llamba.models.mixers import Recurrence
from llamba.models.offloaded import is_offloaded, reading_device
from llamba.models.tree import Tree

FEW = 64  # tokens of a call that is a step of decoding
KNOWN = (HybridBackbone, LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
LEAN = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)  # norm, mixer, sum, norm, SwiGLU, sum
FIXED_ROPES = ("default", "linear", "llama3", "yarn")  # their angles depend on the position alone


class CachePositions:
    """Where the tokens of the current call go: shared by all layers of a cache. `window` None is full attention."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.firsts: list[int] = []  # [B] slot of each row's first new token
        self.slots = self.positions = torch.empty(0)  # [1 or B, T]
        self.end = 0  # slots in use by the longest row
        self.tree: Tree | None = None
        self.lowest = 0  # position of any new token

    def move(self, firsts: list[int], tokens: int, device: torch.device, tree: Tree | None) -> None:
        """Put `tokens` tokens of each row, or the last nodes of a tree, into slots firsts[b] and on."""
        self.firsts, self.end, self.tree = firsts, max(firsts) + tokens, tree
        assert self.end <= self.capacity, "the caller has checked the capacity"
        if min(firsts) == max(firsts):
            self.slots = torch.arange(firsts[0], self.end, device=device)[None]
        else:
            self.slots = torch.tensor(firsts, device=device)[:, None] + torch.arange(tokens, device=device)
        self.positions, self.lowest = self.slots, min(firsts)
        if tree is not None:
            before = len(tree) - tokens
            self.roots = self.slots[:, :1] - before  # [1 or B, 1]
            self.positions, self.lowest = self.roots + tree.depths[before:], min(firsts) - before + min(tree.levels[before:])

    def start(self, window: int | None) -> int:
        """The first slot that any token of this call can see."""
        return 0 if window is None else max(0, self.lowest - window + 1)

    def mask(self, window: int | None) -> Tensor | None:
        """Which slots from `start` on each token sees [1 or B, 1, T, S] bool; None where it sees them all."""
        if self.positions.shape == (1, 1) and self.tree is None:
            return None
        slots, at = torch.arange(self.start(window), self.end, device=self.positions.device), self.positions[:, None, :, None]
        seen, stand = (slots <= at, slots) if self.tree is None else self._of_tree(slots, self.tree)
        return seen if window is None else seen & (stand > at - window)

    def _of_tree(self, slots: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        """Which slots [S] each node sees [1 or B, 1, T, S], and the positions of their tokens [1 or B, 1, 1, S]."""
        node = slots - self.roots  # [1 or B, S]
        near = node.clamp(0, len(tree) - 1)
        among = tree.ancestors[-self.slots.shape[1] :, near].transpose(0, 1) & (node < len(tree))[:, None]  # [1 or B, T, S]
        stand = torch.where(node < 0, slots, self.roots + tree.depths[near])
        return ((node < 0)[:, None] | among)[:, None], stand[:, None, None]


class PlacedLayer(CacheLayerMixin):
    """Keys and values [B, G, S, P] of an attention layer, in slots by position."""

    is_compileable = False
    is_croppable = False  # `Rewindable` does it for all layers at once
    is_sliding = False
    supports_early_init = False
    keys: Tensor
    values: Tensor

    def __init__(self, cache_positions: CachePositions, window: int | None):
        super().__init__()
        self.cache_positions, self.window = cache_positions, window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers, for the shapes and the device of the first keys."""
        (rows, groups, _, width), slots = key_states.shape, self.cache_positions.capacity
        self.keys = key_states.new_zeros(rows, groups, slots, width)
        self.values = value_states.new_zeros(rows, groups, slots, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, G, T, P] at their positions; returns what can be seen of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots, end = self.cache_positions.slots, self.cache_positions.end
        if len(slots) == 1:
            first = end - key_states.shape[2]
            self.keys[:, :, first:end], self.values[:, :, first:end] = key_states, value_states
        else:
            rows = torch.arange(len(slots), device=slots.device)[:, None]
            self.keys[rows, :, slots] = key_states.transpose(1, 2)
            self.values[rows, :, slots] = value_states.transpose(1, 2)
        start = self.cache_positions.start(self.window)
        return self.keys[:, :, start:end], self.values[:, :, start:end]

    def keep(self, firsts: list[int], places: list[list[int]]) -> None:
        """Bring the keys and values of slots firsts[b] + places[b] to slots firsts[b] and on."""
        for buffer in (self.keys, self.values):
            gather(buffer.transpose(1, 2), firsts, places)

    def get_seq_length(self) -> int:
        """Position of the first new token of the longest row."""
        return max(self.cache_positions.firsts, default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that can be seen and the first of them."""
        start = self.cache_positions.start(self.window)
        return self.cache_positions.end - start, start

    def get_max_length(self) -> int:
        """Slots of the buffers."""
        return self.cache_positions.capacity

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        if self.is_initialized:
            self.keys, self.values = self.keys[indices.to(self.keys.device)], self.values[indices.to(self.values.device)]


def kinds_of(model: PreTrainedModel) -> list[str]:
    """Kind of every layer: "full_attention", "sliding_attention" or "linear_attention"."""
    values = vars(model.config)
    plain = "full_attention" if values.get("sliding_window") is None else "sliding_attention"
    return list(values.get("layer_types") or [plain] * values["num_hidden_layers"])


class Rewindable:
    """A model that reads tokens row by row and can go back. `lengths[b]` tokens of row b are read.

    It calls the model's own layers, one after the other, and leaves out what `forward` does around them for every call: masks,
    positions and outputs of any kind. Raises ValueError for a model of another family, an attention implementation that takes no
    mask of ours, and layers that cannot go back.
    """

    def __init__(self, model: PreTrainedModel, capacity: int):
        implementation = model.config._attn_implementation
        backbone: Any = model.base_model
        if not isinstance(backbone, KNOWN):
            raise ValueError(
                f"a model of ours or one of {', '.join(k.__name__ for k in KNOWN[1:])} is needed; got {type(backbone).__name__}"
            )
        self.backbone, self.head = backbone, model.get_output_embeddings()
        self.norm = backbone.get_submodule(backbone.parts.final_norm if isinstance(backbone, HybridBackbone) else "norm")
        self.table: tuple[Tensor, Tensor] | None = None
        self.kinds = kinds_of(model)
        wrong = sorted(set(self.kinds) - {"full_attention", "sliding_attention", RECURRENT})
        if wrong:
            raise ValueError(f"layers that can go back are needed (attention, or mixers of ours); {type(model).__name__} has {wrong[0]}")
        if implementation not in ("sdpa", "eager") and set(self.kinds) != {RECURRENT}:
            raise ValueError(f'speculative decoding needs attn_implementation="sdpa" (or "eager"); got {implementation!r}')
        self.model, self.cache_positions, self.lengths = model, CachePositions(capacity), [0]
        self.device = reading_device(model)
        self.windows = {"full_attention": None, "sliding_attention": vars(model.config).get("sliding_window")}
        layers: list[Any] = [
            RecurrentLayer(model.config.mixer) if kind == RECURRENT else PlacedLayer(self.cache_positions, self.windows[kind])
            for kind in self.kinds
        ]
        self.cache = Cache(layers=layers)
        on_cpu = model.device.type == "cpu" and implementation == "sdpa" and not is_offloaded(model)
        self.lean = on_cpu and all(type(layer) in LEAN for layer in backbone.layers)  # a kernel for each head costs more than its work
        self.recurrent = [layer for layer in layers if isinstance(layer, RecurrentLayer)]

    def start(self, prompts: list[list[int]]) -> None:
        """Read whole prompts, of unequal lengths, that will not be taken back. An empty prompt is allowed."""
        lengths = [len(prompt) for prompt in prompts]
        self.lengths = [0] * len(prompts)
        if max(lengths):
            tokens = torch.tensor([prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts], device=self.device)
            real = torch.arange(tokens.shape[1], device=tokens.device) < torch.tensor(lengths, device=tokens.device)[:, None]
            self._run(tokens, 1, Recurrence(real if min(lengths) < max(lengths) else None))
        self.lengths = lengths

    def record(self) -> None:
        """From now on tokens can be taken back, up to `llamba.models.cache.KEPT` of a row."""
        for layer in self.recurrent:
            layer.activate_past_recording()

    def read(self, tokens: Tensor, keep: int, tree: Tree | None = None) -> Tensor:
        """Read tokens [B, T] behind each row's place; returns the logits [B, keep, V] of the last `keep`.

        `tree`: the tokens are its last T nodes, and the nodes before them are the tokens read last; `keep` the rows' paths before other
        tokens are read.
        """
        logits = self._run(tokens, keep, Recurrence(tree=tree))
        self.lengths = [length + tokens.shape[1] for length in self.lengths]
        return logits

    def _run(self, tokens: Tensor, keep: int, rec: Recurrence) -> Tensor:
        self.cache_positions.move(self.lengths, tokens.shape[1], tokens.device, rec.tree)
        masks: dict[str, Any] = {kind: self._mask(self.windows[kind]) for kind in set(self.kinds) - {RECURRENT}}
        masks[RECURRENT] = rec
        backbone, positions = self.backbone, self.cache_positions.positions
        hidden = backbone.embed_tokens(tokens)  # [B, T, D]
        rotary = self._rotary(hidden, positions)
        grouped = self.lean and tokens.shape[1] <= FEW
        for index, (layer, kind) in enumerate(zip(backbone.layers, self.kinds, strict=True)):
            if grouped and kind != RECURRENT and rotary[0].shape[-1] == layer.self_attn.head_dim:
                mixed = self._grouped(layer.self_attn, layer.input_layernorm(hidden), self.cache.layers[index], masks[kind], rotary)
                hidden = hidden + mixed
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
                continue
            hidden = layer(
                hidden, attention_mask=masks[kind], position_ids=positions, past_key_values=self.cache, use_cache=True,
                position_embeddings=rotary,
            )  # fmt: skip
        return self.head(self.norm(hidden[:, -keep:]))

    @staticmethod
    def _grouped(module: Any, normed: Tensor, own: Any, mask: Tensor | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """The layer's own attention, the query heads of a group as the queries of one head: keys are read once and not repeated."""
        q, k, v = (project(normed).unflatten(-1, (-1, module.head_dim)) for project in (module.q_proj, module.k_proj, module.v_proj))
        if isinstance(module, Qwen3Attention):
            q, k = module.q_norm(q), module.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, *rotary, unsqueeze_dim=2)
        keys, values = own.update(k.transpose(1, 2), v.transpose(1, 2))  # [B, G, S, P]
        (B, T, H, P), G = q.shape, keys.shape[1]
        queries = q.view(B, T, G, H // G, P).permute(0, 2, 3, 1, 4).reshape(B, G, -1, P)  # [B, G, R T, P]
        seen = None if mask is None else mask.repeat(1, 1, H // G, 1)
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=module.scaling)
        y: Tensor = module.o_proj(mixed.view(B, G, H // G, T, P).permute(0, 3, 1, 2, 4).reshape(B, T, H * P))
        return y

    def _rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1 or B, T, P] of the positions; from a table, made once, where they do not depend on the length."""
        if self.table is None:
            rotary = self.backbone.rotary_emb
            if rotary.rope_type not in FIXED_ROPES:
                return rotary(hidden, position_ids=positions)
            self.table = rotary(hidden, position_ids=torch.arange(self.cache_positions.capacity, device=hidden.device)[None])
        cos, sin = self.table
        if len(positions) == 1 and self.cache_positions.tree is None:
            part = slice(self.cache_positions.end - positions.shape[1], self.cache_positions.end)
            return cos[:, part], sin[:, part]
        return cos[0, positions], sin[0, positions]

    def _mask(self, window: int | None) -> Tensor | None:
        """What is added to the scores, made once: of a mask of True and False each layer would make it anew."""
        mask = self.cache_positions.mask(window)
        if mask is None:
            return None
        return torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device).masked_fill_(~mask, torch.finfo(self.model.dtype).min)

    def rollback(self, tokens: list[int]) -> None:
        """Take back the last tokens[b] tokens of each row. Raises ValueError, and changes nothing, for more than are held."""
        self._check(tokens)
        for layer in self.recurrent:
            layer.check_rollback(tokens)
        self.lengths = [length - back for length, back in zip(self.lengths, tokens, strict=True)]
        if any(tokens):
            for layer in self.recurrent:
                layer.rollback(tokens)

    def keep(self, tokens: int, paths: list[list[int]]) -> None:
        """Of each row's last `tokens` tokens, a tree, keep the nodes paths[b] (from the root on), and take back the others.

        Raises ValueError, and changes nothing, where so many are not held or paths do not rise.
        """
        check_places(tokens, paths)
        self._check([tokens] * len(paths))
        for recurrent in self.recurrent:
            recurrent.check_keep(tokens, paths)
        firsts = [length - tokens for length in self.lengths]
        for layer in self.cache.layers:
            if isinstance(layer, RecurrentLayer):
                layer.keep(tokens, paths)
            elif isinstance(layer, PlacedLayer):
                layer.keep(firsts, paths)
        self.lengths = [first + len(path) for first, path in zip(firsts, paths, strict=True)]

    def _check(self, back: list[int]) -> None:
        if len(back) != len(self.lengths) or any(not 0 <= b <= length for b, length in zip(back, self.lengths, strict=True)):
            raise ValueError(f"rows have {self.lengths} tokens that could be taken back; got {back}")

    def commit(self) -> None:
        """Declare that nothing read so far will be taken back."""
        for layer in self.recurrent:
            layer.commit()

    def select(self, rows: list[int]) -> None:
        """Keep these rows only."""
        self.lengths = [self.lengths[row] for row in rows]
        self.cache.batch_select_indices(torch.tensor(rows))
