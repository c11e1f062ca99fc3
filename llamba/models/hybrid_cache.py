"""A transformers cache made ours: our layers where the model is recurrent, and a crop that changes all layers or none.

Shapes: B batch, G key/value heads, T tokens, P head width.
"""

from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)  # fmt: skip

from llamba.models.cache import RecurrentLayer

RECURRENT = "linear_attention"


class AtomicCrop:
    """Mixed into a transformers cache, before it: a `crop` that any layer refuses changes none."""

    layers: list[Any]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens of every row, in all layers. Raises ValueError where a layer cannot."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of tokens to remove; got {tokens_to_remove}")
        before = [dict(vars(layer)) for layer in self.layers]  # no layer of transformers writes into its tensors
        try:
            for layer in sorted(self.layers, key=lambda layer: not isinstance(layer, StaticLayer)):  # the reason that has a remedy first
                if isinstance(layer, RecurrentLayer):
                    layer.check_crop(tokens_to_remove)
                else:
                    _check_attention(layer, -tokens_to_remove)
            super().crop(tokens_to_remove)  # type: ignore[misc]
        except (ValueError, RuntimeError):
            for layer, values in zip(self.layers, before, strict=True):
                vars(layer).clear()
                vars(layer).update(values)
            raise

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (type(self).__bases__[1],), vars(self)


def _check_attention(layer: Any, back: int) -> None:
    """What transformers itself would not notice: keys that a static layer overwrote or a window of attention has dropped."""
    if isinstance(layer, StaticLayer):
        raise ValueError("a static cache takes no tokens back; use DynamicCache(config=model.config)")
    if back > 0 and isinstance(layer, DynamicLayer):
        seen = layer.get_seq_length()
        if back > seen:
            raise ValueError(f"cannot take back {back} tokens: the cache holds {seen}")
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None:
            held, window = layer.keys.shape[-2], layer.sliding_window
            if held - back < min(window - 1, seen - back):
                raise ValueError(
                    f"cannot take back {back} tokens: attention in a window of {window} holds only the tokens since the last crop after "
                    "cache.activate_past_recording()"
                )


_MADE: dict[type[Cache], Any] = {}


def with_atomic_crop(kind: type[Cache]) -> Any:
    """The class of caches `kind` with a crop that changes all layers or none."""
    if kind not in _MADE:
        _MADE[kind] = type(kind.__name__, (AtomicCrop, kind), {"__module__": __name__})
    return _MADE[kind]


GROWING = with_atomic_crop(DynamicCache)


def _empty(kind: type[Cache]) -> Cache:
    made = with_atomic_crop(kind)
    return made.__new__(made)


def new_hybrid_cache(config: PreTrainedConfig) -> Cache:
    """An empty cache that grows, for a model of this configuration."""
    return as_hybrid_cache(GROWING(config=config), config)


def as_hybrid_cache(cache: Cache, config: PreTrainedConfig) -> Cache:
    """Give an empty transformers cache our layers where the model is recurrent; a cache that has them is returned as it is.

    Raises ValueError for what is no such cache, and for one that another model has filled.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise ValueError(f"past_key_values must be a cache such as DynamicCache(config=model.config); got {type(cache).__name__}")
    layers: list[Any] = cache.layers or DynamicCache(config=config).layers
    if len(layers) != len(config.layer_types):
        raise _foreign(f"it has {len(layers)} layers and this model has {len(config.layer_types)}")
    mixer = {key: value for key, value in config.mixer.items() if key != "layers"}
    ours = [_ours(index, kind, layer, config, mixer) for index, (kind, layer) in enumerate(zip(config.layer_types, layers, strict=True))]
    if not isinstance(cache, AtomicCrop):
        cache.__class__ = with_atomic_crop(type(cache))
    cache.layers, cache.layer_class_to_replicate = ours, None
    return cache


def _ours(index: int, kind: str, layer: Any, config: PreTrainedConfig, mixer: dict[str, Any]) -> Any:
    if kind != RECURRENT:
        _check_kept(index, layer, config)
    elif not isinstance(layer, RecurrentLayer):
        return _in_place_of(index, layer, mixer)
    elif layer.mixer != mixer:
        raise _foreign(f"layer {index} is of a mixer {_difference(layer.mixer, mixer)}")
    return layer


def _in_place_of(index: int, layer: Any, mixer: dict[str, Any]) -> RecurrentLayer:
    """A new layer for one of transformers' that holds nothing."""
    linear = isinstance(layer, LinearAttentionCacheLayerMixin)
    if any(layer.has_previous_state.values()) if linear else layer.get_seq_length() > 0:
        held = "a state of another kind" if linear else "keys and values"
        raise _foreign(f"layer {index} holds {held}, and this model is recurrent there")
    made = RecurrentLayer(mixer)
    made.record_past = linear and layer.record_past
    return made


def _check_kept(index: int, layer: Any, config: PreTrainedConfig) -> None:
    """Raise ValueError unless the layer is for attention and holds nothing, or keys [B, G, T, P] of this model's heads."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        raise _foreign(f"layer {index} is recurrent, and this model has attention there")
    if isinstance(layer, (DynamicLayer, StaticLayer)) and layer.keys is not None and layer.keys.ndim == 4:
        width = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
        want, got = (config.num_key_value_heads, width), (layer.keys.shape[1], layer.keys.shape[3])
        if want != got:
            raise _foreign(f"layer {index} holds {got[0]} key heads of width {got[1]}, and this model has {want[0]} of {want[1]}")


def _difference(got: dict[str, Any], want: dict[str, Any]) -> str:
    name = next(name for name in want if got.get(name) != want[name])
    return f"with {name}={got.get(name)!r}, and this model's has {name}={want[name]!r}"


def _foreign(reason: str) -> ValueError:
    return ValueError(f"the cache was made for or filled by another model: {reason}; pass an empty cache or past_key_values=None")


def check_rows(cache: Cache, rows: int) -> None:
    """Raise ValueError where the cache holds another number of rows than are read."""
    for layer in cache.layers:
        held = rows
        if isinstance(layer, RecurrentLayer):
            held = len(layer.counts) or rows
        elif type(layer) is DynamicLayer and layer.keys is not None and layer.get_seq_length():
            held = len(layer.keys)
        if held != rows:
            raise ValueError(f"the cache holds {held} rows and {rows} are read; use cache.batch_select_indices or batch_repeat_interleave")
