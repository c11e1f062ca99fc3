"""Rotation of heads by position (Su et al., "RoFormer", 2021, arXiv 2104.09864), halves as in Llama, of all or the first coordinates.

Shapes: H heads, P head width, Q <= P coordinates that are turned; leading dimensions are free.
"""

import torch
from torch import Tensor


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads [..., H, P] with the first Q coordinates turned by the angles whose cosines and sines are cos and sin [..., Q]."""
    width = cos.shape[-1]
    if width < heads.shape[-1]:
        return torch.cat((turned(heads[..., :width], cos, sin), heads[..., width:]), -1)
    first, second = heads.chunk(2, -1)
    return torch.addcmul(heads * cos[..., None, :], torch.cat((-second, first), -1), sin[..., None, :])
