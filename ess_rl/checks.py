"""Checks for mistakes that would pass silently: shapes that broadcast, numbers for flags, unknown choices."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ess_rl.errors import UsageError


def same_shape(**tensors: Tensor) -> None:
    """Raises ValueError unless all have the same shape: otherwise each sample would be paired with others."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"shapes differ: {listed}; give all of them one value per sample, in the same shape")


def flags(**tensors: Tensor) -> None:
    """Raises ValueError unless all are bool and have the same shape."""
    for name, x in tensors.items():
        if x.dtype != torch.bool:
            raise ValueError(f"{name} is {x.dtype}, not bool: give {name}.bool()")
    same_shape(**tensors)


def choices(config: Any) -> None:
    """Raises UsageError if a field of a Config is set to an unknown choice."""
    for name, kind in get_type_hints(type(config)).items():
        words = [word for part in (kind, *get_args(kind)) if get_origin(part) is Literal for word in get_args(part)]
        value = getattr(config, name)
        if words and isinstance(value, str) and value not in words:
            raise UsageError(f"{name} {value!r}: choose one of {', '.join(map(str, words))}")
