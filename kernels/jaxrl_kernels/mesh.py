"""How a mesh of devices divides the work of kernels and models: one table, and `shard_map` where XLA needs telling.

`jax.set_mesh(mesh)` names the mesh; without it, everything here does nothing. XLA divides what is made of products and
sums by itself. What a kernel does row by row or head by head is put under `shard_map` (`split`): XLA cannot divide a
Pallas call, and would gather all rows for a blocked loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

AXES = ("data", "fsdp", "tensor", "sequence", "expert")

# Which axes of the mesh divide what. Rows are divided by all axes that do not divide what is done to a row, so that no
# device does another's work again.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "slots": ("data", "fsdp", "expert"),  # rows that a sampler decodes side by side
    "length": ("sequence",),
    "width": ("fsdp",),  # of parameters: gathered for a layer where it is used
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "vocabulary": ("tensor",),
    "experts": ("expert",),
}


def current_mesh() -> Any:
    """The mesh that `jax.set_mesh` has named; None without one, on one device, and inside of `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def mesh_axes(logical: str | None, size: int, *, mesh: Any = None, strict: bool = True) -> tuple[str, ...] | None:
    """The axes of the mesh (by default the current one) that divide a `logical` axis of this size; None for none.

    Raises:
      ValueError: they do not divide it. Without `strict`, as many of them as do are taken.
    """
    mesh = mesh or current_mesh()
    if mesh is None or logical is None:
        return None
    axes = tuple(axis for axis in RULES[logical] if mesh.shape.get(axis, 1) > 1)
    while axes and size % (number := math.prod(mesh.shape[axis] for axis in axes)):
        if strict:
            given = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            fitting = min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - number), n))
            whose = "that axis" if len(axes) == 1 else "the product of those axes"
            raise ValueError(
                f"{logical} of size {size} does not divide among {given} of the mesh; the nearest size of {whose} "
                f"that fits is {fitting}"
            )
        axes = axes[:-1]
    return axes or None


def row_spec(shape: tuple[int, ...]) -> PartitionSpec:
    """How an array of rows lies: its first axis as "batch", its second as "length", as far as they divide."""
    return PartitionSpec(*(mesh_axes(*axis, strict=False) for axis in zip(("batch", "length"), shape, strict=False)))


def split_rows(function: Callable, arrays: Any, num_rows: int) -> Callable:
    """`split` of a function that goes along whole rows: among `arrays`, a tuple of what it takes, those with `num_rows`
    rows are divided, and so are all of its results."""
    rows = row_spec((num_rows,))
    specs = jax.tree.map(lambda x: rows if x.shape[:1] == (num_rows,) else PartitionSpec(), arrays)
    return split(function, specs, rows)


def constrain(x: Array, *logical: str | None) -> Array:
    """`x` laid out over the current mesh, an entry per leading axis (None: whole on every device); what does not divide
    stays whole."""
    mesh = current_mesh()
    if mesh is None:
        return x
    axes = [mesh_axes(name, size, strict=False) for name, size in zip(logical, x.shape, strict=False)]
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(axes))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes, *rest))


def split(function: Callable, in_specs: Any, out_specs: Any, *, check_vma: bool = False) -> Callable:
    """The function on each device's part of its arguments (`jax.shard_map`); without a mesh, the function.

    `check_vma` types what differs between devices, which saves sums over devices in the backward pass; loops with
    kernels in them, and Pallas calls under `vmap`, do not have such types.
    """
    if current_mesh() is None:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
