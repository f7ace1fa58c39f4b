"""Checks on the first lines of every op. They read shapes, types and plain Python numbers, so under jit they cost
nothing and speak at trace time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np


def check_shapes(**arguments: tuple[Any, str]) -> None:
    """Compares arrays with shapes written in axis letters: `check_shapes(rewards=(rewards, "B"), mask=(mask, "B T"))`.

    A letter stands for the size it had where it was met first; a leading `...` for any number of axes, the same
    everywhere. An argument that is None is passed over. The name tells the type, as in the whole library: what ends in
    `mask`, `valid` or `correct` is boolean, what ends in `ids` or `lengths` is an integer.

    Raises:
      ValueError: names the argument, the shape or type expected, the one it has, and which argument fixed a letter.
    """
    sizes: dict[str, tuple[Any, str]] = {}
    for name, (array, axes) in arguments.items():
        if array is None:
            continue
        if not hasattr(array, "shape"):
            raise ValueError(
                f"{name} must be an array of shape [{_listed(axes)}], got {type(array).__name__} {array!r}"
            )
        _check_type(name, array)
        letters, shape = axes.split(), tuple(array.shape)
        if letters[0] == "...":
            leading = max(len(shape) - len(letters) + 1, 0)
            shape = (shape[:leading], *shape[leading:])
        if len(letters) != len(shape):
            raise ValueError(f"{name} must have shape [{_listed(axes)}], got {list(array.shape)}")
        for letter, size in zip(letters, shape, strict=True):
            known, source = sizes.setdefault(letter, (size, name))
            if known != size:
                shown = {key: value for key, (value, _) in sizes.items() if key in letters}
                raise ValueError(
                    f"{name} must have shape [{_listed(axes)}] with {_where(shown)} as {source} has, "
                    f"got {list(array.shape)}"
                )


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError, with the list of choices, where `value` is not one of a Literal's (or of a sequence)."""
    allowed = get_args(choices) or tuple(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def check_range(
    name: str,
    value: Any,
    low: float = -np.inf,
    high: float = np.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raises ValueError where a plain number lies outside [low, high]; an array (a schedule's value) passes."""
    if value is None or not isinstance(value, int | float | np.number):
        return
    if not (low < value if open_low else low <= value) or not (value < high if open_high else value <= high):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high or high == np.inf else ']'}"
        raise ValueError(f"{name} must lie in {interval}, got {value}")


def is_concrete(*arrays: Any) -> bool:
    """Whether values can be looked at (with numpy, since jnp would trace): false while jit, vmap or grad trace."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def check_ids_below(name: str, ids: Any, limit: int) -> None:
    """Outside jit, raises ValueError where an id is `limit` or more; inside jit such an id counts as absent."""
    if is_concrete(ids) and ids.size and (largest := int(np.max(np.asarray(ids)))) >= limit:
        raise ValueError(f"{name} must be below {limit}, the number of values they point into, got {largest}")


def _check_type(name: str, array: Any) -> None:
    if name.endswith(("mask", "valid", "correct")) and array.dtype != bool:
        raise ValueError(f"{name} must be boolean, got {array.dtype}; pass {name} != 0")
    if name.endswith(("ids", "lengths")) and not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {array.dtype}")


def _listed(axes: str) -> str:
    return ", ".join(axes.split())


def _where(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{letter}={list(size) if isinstance(size, tuple) else size}" for letter, size in sizes.items())
