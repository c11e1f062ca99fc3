"""Measuring with the recurrence and without: what a hybrid's window and attention do alone, and so what its states are worth."""

from typing import Any

from llamba.models.mixers import Mixer

CHOICES = {"on": (False,), "off": (True,), "both": (False, True)}


def switched(model: Any, choice: str) -> tuple[bool, ...]:
    """Whether the recurrence is off, in each measurement that a choice of "on", "off" or "both" asks for.

    Raises ValueError for another choice, and for a recurrence switched off in a model that has none.
    """
    if choice not in CHOICES:
        raise ValueError(f"--recurrence must be one of {', '.join(CHOICES)}, got {choice}")
    if choice != "on" and not any(isinstance(module, Mixer) for module in model.modules()):
        raise ValueError(f"--recurrence {choice} needs a model with recurrent layers, and this one has none; leave it out")
    return CHOICES[choice]
