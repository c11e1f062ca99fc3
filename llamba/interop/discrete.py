"""What Phi-Mamba and Cartesia's Llamba share: the discrete Mamba-2 layer of goombalab/phi-mamba (arXiv 2408.10189) as ours.

Their projection's rows are x | B | C | z | a, with a bias of z that stands alone; ours are z | x | B | C | dt.
Shapes: D model width, H heads of x, Q heads of B and C, P head width, N state width.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from llamba.interop.published import Shapes, Take, same

ACTIVATIONS = {"identity": None, "silu": "silu", "swish": "silu"}


def mixer_options(width: int, core: dict[str, Any], where: str) -> dict[str, Any]:
    """Our mixer's options for their layer of this width and these arguments. Raises ValueError for what ours cannot be."""
    heads, shared = core.get("n_v_heads", 32), core.get("n_qk_heads", 32)
    inner = core.get("expand", 1) * width
    if inner % heads or heads % shared:
        raise ValueError(f"{where}: n_v_heads must divide the width and be a multiple of n_qk_heads; got {heads}, {inner} and {shared}")
    activation = core.get("activation", "identity")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    return {
        "heads": heads, "groups": heads, "head_dim": inner // heads, "state": core.get("d_state", 64), "conv_width": core.get("d_conv", 4),
        "conv_activation": ACTIVATIONS[activation], "out_norm": False, "proj_bias": True, "out_bias": bool(core.get("bias", False)),
        "qk_norm": None,
    }  # fmt: skip


def layer_table(ours: str, theirs: str, core: dict[str, Any], options: dict[str, Any], shapes: Shapes) -> dict[str, Take]:
    """Our mixer's tensors from those of their layer."""
    heads, width, state = options["heads"], options["head_dim"], options["state"]
    shared = core.get("n_qk_heads", 32)
    order = partial(_reordered, heads, shared, width, state)
    conv = partial(_channels, heads, shared, width, state)
    table = {
        f"{ours}in_proj.weight": Take((f"{theirs}in_proj.weight",), order),
        f"{ours}conv1d.weight": Take((f"{theirs}conv1d.weight",), conv),
        f"{ours}conv1d.bias": Take((f"{theirs}conv1d.bias",), conv),
        f"{ours}D": same(f"{theirs}D"),
        f"{ours}dt_bias": Take((f"{theirs}D",), torch.zeros_like),
        f"{ours}out_proj.weight": same(f"{theirs}out_proj.weight"),
    }
    if f"{theirs}conv1d.bias" not in shapes:
        table[f"{ours}conv1d.bias"] = Take((f"{theirs}conv1d.weight",), lambda weight: conv(weight).new_zeros(len(conv(weight))))
    if core.get("bias", False):
        table[f"{ours}in_proj.bias"] = Take((f"{theirs}in_proj.bias",), order)
        table[f"{ours}out_proj.bias"] = same(f"{theirs}out_proj.bias")
    else:
        rest = heads * (width + 2 * state + 1)
        table[f"{ours}in_proj.bias"] = Take((f"{theirs}z_bias",), lambda z: torch.cat((z, z.new_zeros(rest))))
    return table


def _spread(tensor: Tensor, heads: int, shared: int) -> Tensor:  # [Q N, ...] -> [H N, ...]
    return tensor.unflatten(0, (shared, -1)).repeat_interleave(heads // shared, 0).flatten(0, 1)


def _reordered(heads: int, shared: int, width: int, state: int, rows: Tensor) -> Tensor:
    """x | B | C | z | a -> z | x | B | C | dt."""
    x, b, c, z, a = rows.split([heads * width, shared * state, shared * state, heads * width, heads])
    return torch.cat((z, x, _spread(b, heads, shared), _spread(c, heads, shared), a))


def _channels(heads: int, shared: int, width: int, state: int, channels: Tensor) -> Tensor:
    """x | B | C, with B and C for every head."""
    x, b, c = channels.split([heads * width, shared * state, shared * state])
    return torch.cat((x, _spread(b, heads, shared), _spread(c, heads, shared)))
