"""What an importer says of a published checkpoint: its configuration as ours, and where each of our tensors comes from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

Shapes = Mapping[str, tuple[int, ...]]  # names and shapes of a checkpoint's tensors


class Take(NamedTuple):
    """A tensor of ours: the names of theirs that it is made of, and how."""

    names: tuple[str, ...]
    make: Callable[..., Tensor]


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _together(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


def same(name: str) -> Take:
    """Their tensor as it is."""
    return Take((name,), _alone)


def stacked(*names: str) -> Take:
    """Their tensors one below the other."""
    return Take(names, _together) if len(names) > 1 else same(*names)


@dataclass
class Published:
    """A checkpoint as ours. `quirks`: what is computed otherwise than in a student of llamba, for these weights alone."""

    name: str
    config: PreTrainedConfig
    table: dict[str, Take]
    quirks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
