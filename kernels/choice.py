"""Which form of an operation runs: the caller's `impl`, else the environment's LLAMBA_KERNELS, else what suits the device.

"auto" takes Triton on CUDA where it is installed and can take the tensors, and PyTorch elsewhere. "sequential" is the oracle, one
token at a time. A value of LLAMBA_KERNELS that an operation does not have leaves that operation at "auto".
"""

import importlib.util
import logging
import os

from torch import Tensor

VARIABLE = "LLAMBA_KERNELS"
PACKAGES = {"triton": "triton", "mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d", "fla": "flash-linear-attention"}

Obstacle = str | None  # why a form cannot take these tensors, as a sentence

logger = logging.getLogger("llamba.kernels")
_announced: set[tuple[str, str]] = set()


def choose(op: str, impl: str, forms: tuple[str, ...], example: Tensor, obstacle: Obstacle = None) -> str:
    """The form, one of `forms`, in which `op` runs on tensors like `example`; told once per operation and form to the log.

    `obstacle` says why Triton cannot take these tensors, if so. Raises `ValueError` for an unknown `impl`, and where the form that
    was asked for cannot run here: its package is missing, the tensors are on the wrong device, or there is an obstacle.
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
    elif asked in PACKAGES:
        need(op, asked)
    if (op, asked) not in _announced:
        _announced.add((op, asked))
        logger.info("%s runs in %s", op, asked)
    return asked


def need(op: str, module: str) -> None:
    """Raise `ValueError` unless `module`, which `op` was asked to run in, is installed."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{op} was asked to run in {module}, which is not installed: pip install {PACKAGES[module]}, or impl='torch'")


def _from_environment(forms: tuple[str, ...]) -> str:
    value = os.environ.get(VARIABLE, "auto")
    known = ("auto", "torch", "sequential", *PACKAGES)
    if value not in known:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(known)}; got {value!r}")
    return value if value in forms else "auto"


def _triton_obstacle(example: Tensor, obstacle: Obstacle) -> Obstacle:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton, or impl='torch'"
    if example.device.type != "cuda" and not interpreted:
        return f"it needs tensors on CUDA, got {example.device.type} (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    if example.device.type == "cuda" and example.element_size() == 8:
        return "its kernels take fp32 and 16-bit tensors on CUDA, got fp64"
    return obstacle
