"""What the Triton kernels share on the host: number formats, tile widths, and the tensors that they can take.

Only the Triton files of the operations import this module; a door does so when it takes a Triton path.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator

WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


def sums_in(tensor: Tensor) -> tl.dtype:
    """The format of sums and states for inputs like `tensor`: fp64 stays, everything else is fp32."""
    return WIDE[accumulator(tensor.dtype)]


def precision(tensor: Tensor) -> str:
    """How tensor cores multiply fp32 operands: one pass of tf32 beside 16-bit inputs, which round more; three for fp32 inputs."""
    return "tf32" if tensor.element_size() == 2 else "tf32x3"


def width(size: int, least: int = 16) -> int:
    """The tile width that holds `size` entries: a power of 2, at least what a matrix product takes."""
    return max(least, triton.next_power_of_2(size))


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """A context that launches on the device of `tensor`, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
