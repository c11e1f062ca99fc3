"""Which form of an operation runs: the caller's `impl`, else the environment's LLAMBA_KERNELS, else what suits the device.

"auto" takes Triton on CUDA where it is installed and can take the tensors, and PyTorch elsewhere. "sequential" is the oracle, one
token at a time. Other packages run only where they are asked for. A value of LLAMBA_KERNELS that an operation does not have leaves that
operation at "auto".
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

VARIABLE = "LLAMBA_KERNELS"
PACKAGES = {"triton": "triton", "mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d", "fla": "flash-linear-attention"}

Obstacle = str | None  # why a form cannot take these tensors, as a sentence

logger = logging.getLogger("llamba.kernels")
_announced: set[tuple[str, str]] = set()


def choose(
    op: str,
    impl: str,
    forms: tuple[str, ...],
    example: Tensor,
    obstacle: Obstacle = None,
    packages: Mapping[str, Obstacle] | None = None,
) -> str:
    """The form, one of `forms`, in which `op` runs on tensors like `example`; told once per operation and form to the log.

    `obstacle` says why Triton cannot take these tensors, if so, and `packages` the same of other packages. Raises `ValueError` for an
    unknown `impl`, and where the form that was asked for cannot run here: its package is missing, the tensors are on the wrong device, or
    there is an obstacle.
    """
    if impl not in ("auto", *forms):
        raise ValueError(f"impl must be one of {', '.join(('auto', *forms))}; got {impl!r}")
    asked = impl if impl != "auto" else _from_environment(forms)
    if asked == "auto":
        if example.device.type == "cpu":
            return "torch"
        asked = "triton" if "triton" in forms and _triton_obstacle(example, obstacle) is None else "torch"
    elif asked == "triton" and (reason := _triton_obstacle(example, obstacle)) is not None:
        raise ValueError(f"{op} cannot run in Triton: {reason}")
    elif asked in PACKAGES and asked != "triton":
        need(op, asked)
        if (reason := _device_obstacle(example, True) or (packages or {}).get(asked)) is not None:
            raise ValueError(f"{op} cannot run in {asked}: {reason}")
    if (op, asked) not in _announced:
        _announced.add((op, asked))
        logger.info("%s runs in %s", op, asked)
    return asked


def need(op: str, module: str) -> None:
    """Raise `ValueError` unless `module`, which `op` was asked to run in, is installed."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{op} was asked to run in {module}, which is not installed: pip install {PACKAGES[module]}, or impl='torch'")


def load(op: str, module: str, name: str) -> Any:
    """`name` of a package's `module`. Raises `ValueError` where its import fails, as that of a build for another torch does."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(
            f"{op} was asked to run in {package}, which is installed but cannot be imported ({error}): build {PACKAGES[package]} for this "
            "torch and CUDA, or impl='torch'"
        ) from error


def _from_environment(forms: tuple[str, ...]) -> str:
    value = os.environ.get(VARIABLE, "auto")
    known = ("auto", "torch", "sequential", *PACKAGES)
    if value not in known:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(known)}; got {value!r}")
    return value if value in forms else "auto"


def _triton_obstacle(example: Tensor, obstacle: Obstacle) -> Obstacle:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton, or impl='torch'"
    return _device_obstacle(example, example.device.type == "cuda") or obstacle


def product_obstacle(*tensors: Tensor) -> Obstacle:
    """Why Triton cannot multiply matrices of these tensors here: its interpreter (3.9.0) takes bf16 entries for whole numbers."""
    if os.environ.get("TRITON_INTERPRET") == "1" and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return "Triton's interpreter multiplies bf16 matrices wrongly; pass fp32, or impl='torch'"
    return None


def _device_obstacle(example: Tensor, compiled: bool) -> Obstacle:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if example.device.type != "cuda" and not interpreted:
        return f"it needs tensors on CUDA, got {example.device.type} (TRITON_INTERPRET=1 runs Triton's kernels on the CPU, slowly)"
    if compiled and example.element_size() == 8:
        return "its kernels take fp32 and 16-bit tensors, got fp64"
    return None
