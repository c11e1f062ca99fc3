"""Rotation of heads by position (Su et al., "RoFormer", 2021, arXiv 2104.09864), halves as in Llama, of all or the first coordinates.

Shapes: H heads, P head width, Q <= P coordinates that are turned; leading dimensions are free.
"""

import torch
from torch import Tensor


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads [..., H, P] with the first Q coordinates turned by the angles whose cosines and sines are cos and sin [..., Q]."""
    return turned_each(heads, cos.unsqueeze(-2), sin.unsqueeze(-2))


def turned_each(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`turned` by cos and sin [..., H or 1, Q], which may differ between heads."""
    width = cos.shape[-1]
    if width < heads.shape[-1]:
        return torch.cat((turned_each(heads[..., :width], cos, sin), heads[..., width:]), -1)
    first, second = heads.chunk(2, -1)
    return torch.addcmul(heads * cos, torch.cat((-second, first), -1), sin)
