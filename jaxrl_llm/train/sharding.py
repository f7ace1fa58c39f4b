"""A training state over a mesh of devices: which axis of which array lies on which axis of the mesh.

    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        state = shard_state(state)
        state, metrics = step(state, shard_batch(batch))

| mesh axis | divides | costs |
| --- | --- | --- |
| `data` | rows of the batch | a sum of gradients |
| `fsdp` | rows; the width of all matrices and their optimizer state | weights gathered for each layer |
| `tensor` | heads, feed-forward units, vocabulary | two sums of hidden states a layer, three numbers a token |
| `sequence` | the places of a row | keys and values go around (ring attention) |
| `expert` | rows, and the experts | tokens brought together, their sums sent back |

Paths of parameters to logical axes is the table here, logical axes to axes of the mesh the one of
`jaxrl_kernels.mesh`. A step and a sampler are the same code with and without a mesh, under plain `jax.jit`. All
functions of shardings take shapes (`jax.eval_shape`) as well as arrays, and need no device that is there.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxrl_kernels.mesh import AXES, current_mesh, mesh_axes

Tree = TypeVar("Tree")

# The end of a parameter's dotted path, and the logical axes of its last axes. What is not named (norms, routers,
# the last map of a head) is small, and whole on every device.
# LoRA's matrices take after the one that they are added to, optimizer states after their parameters.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding|head", ("vocabulary", "width")),
    (r"(cross_)?attention\.(query|key|value)\.kernel", ("width", "heads")),
    (r"attention\.(query|key|value)\.bias", ("heads",)),
    (r"(cross_)?attention\.out\.kernel", ("heads", "width")),
    (r"experts\.(gate|up)", ("experts", "width", "ffn")),
    (r"experts\.down", ("experts", "ffn", "width")),
    (r"(gate|up)\.kernel", ("width", "ffn")),
    (r"(gate|up)\.bias", ("ffn",)),
    (r"down\.kernel", ("ffn", "width")),
    (r"hidden\.\d+\.kernel", ("width", None)),  # of value and reward heads
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the axes `data`, `fsdp`, `tensor`, `sequence` and `expert` that are larger than 1.

    Neighbors along the last axes are nearest to each other, so that what is exchanged most often travels least.

    Args:
      devices: by default all that there are; those of a described topology will do to compile for it.

    Raises:
      ValueError: an axis of another name, a size below 1, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if unknown := sorted(set(sizes) - set(AXES)):
        raise ValueError(f"unknown mesh axes {unknown}; there are {', '.join(AXES)}")
    if wrong := {axis: size for axis, size in sizes.items() if not isinstance(size, int) or size < 1}:
        raise ValueError(f"mesh axes must have sizes of at least 1, got {wrong}")
    full = {axis: sizes.get(axis, 1) for axis in AXES}
    if (product := math.prod(full.values())) != len(devices):
        given = " x ".join(f"{axis}={size}" for axis, size in full.items() if size > 1) or "a mesh of one device"
        others = product // full["data"]
        fitting = f"data={len(devices) // others} would fit" if len(devices) % others == 0 else "no data= would fit"
        raise ValueError(
            f"{given} wants {product} devices, but there are {len(devices)}; with the other axes {fitting}"
        )
    # without axes of size 1, along which a `shard_map` would sum gradients for nothing
    order = [axis for axis in ("data", "fsdp", "expert", "sequence", "tensor") if full[axis] > 1] or ["data"]
    shape = [full[axis] for axis in order]
    return Mesh(np.asarray(devices).reshape(shape), order, axis_types=(AxisType.Auto,) * len(order))


def state_shardings(state: PyTree, mesh: Mesh | Any) -> PyTree:
    """The sharding of every leaf of a state, or of parameters alone, by the end of its path.

    Raises:
      ValueError: a leaf does not divide; its path, the axis and the nearest size that fits are named.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(path, leaf, mesh)), state)


def batch_shardings(batch: PyTree, mesh: Mesh | Any) -> PyTree:
    """The sharding of every array of a batch: the first axis is that of rows, the second that of places, where it is as
    long as that of any of the arrays; else it is of turns, say, and whole. Scalars are whole everywhere.

    Raises:
      ValueError: rows or places do not divide; the axis and the nearest size that fits are named.
    """
    longest = max((leaf.shape[1] for leaf in jax.tree.leaves(batch) if len(leaf.shape) > 1), default=0)

    def one(leaf: Any) -> NamedSharding:
        names = ("batch", "length" if leaf.shape[1:2] == (longest,) else None)
        return NamedSharding(
            mesh, _plain([mesh_axes(*axis, mesh=mesh) for axis in zip(names, leaf.shape, strict=False)])
        )

    return jax.tree.map(one, batch)


def use_mesh(config: Any) -> contextlib.AbstractContextManager:
    """`jax.set_mesh` of the mesh that `config.mesh` describes; nothing where its axes are all 1, or there is no entry,
    unless there are several processes.

    Raises:
      ValueError: as `make_mesh`.
    """
    sizes = dict(config.get("mesh") or {})
    alone = set(sizes.values()) <= {1} and jax.process_count() == 1
    return contextlib.nullcontext() if alone else jax.set_mesh(make_mesh(sizes))


def shard_state(state: Tree, mesh: Mesh | None = None) -> Tree:
    """The state with every leaf where `state_shardings` wants it; by default on the current mesh, if there is one."""
    mesh = mesh or jax.sharding.get_mesh()
    return state if mesh.empty else jax.device_put(state, state_shardings(state, mesh))


def shard_batch(batch: Tree, mesh: Mesh | None = None, *, own_rows: bool = False) -> Tree:
    """The batch with every array where `batch_shardings` wants it; by default on the current mesh, if there is one.

    Args:
      own_rows: with several processes, each has an equal part of the rows, in the order of processes (as
        `data.next_batch` gives them). Else each has the whole batch, and takes of it what its devices need.

    Raises:
      ValueError: rows or places do not divide; with `own_rows`, also the processes are not all along axes of rows.
    """
    mesh = mesh or jax.sharding.get_mesh()
    if mesh.empty:
        return batch
    if jax.process_count() == 1:
        return jax.device_put(batch, batch_shardings(batch, mesh))
    parts = jax.process_count() if own_rows else 1

    def whole(leaf: Any) -> jax.ShapeDtypeStruct:
        rows = [parts * size for size in np.shape(leaf)[:1]]
        return jax.ShapeDtypeStruct((*rows, *np.shape(leaf)[1:]), leaf.dtype)

    def place(leaf: Any, shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:  # made by all of them already
            return jax.device_put(leaf, sharding)
        if own_rows:
            return jax.make_array_from_process_local_data(sharding, leaf, shape.shape)
        return jax.make_array_from_callback(shape.shape, sharding, lambda index: leaf[index])

    shapes = jax.tree.map(whole, batch)
    return jax.tree.map(place, batch, shapes, batch_shardings(shapes, mesh))


def constrain_state(state: Tree) -> Tree:
    """Inside of `jit`: the state, or parameters or gradients alone, laid out over the current mesh; as it is without
    one. What comes out of a step then lies as what went in, and the next step is the same program."""
    mesh = current_mesh()
    return state if mesh is None else jax.lax.with_sharding_constraint(state, state_shardings(state, mesh))


def constrain_rows(batch: Tree, axis: int) -> Tree:
    """Inside of `jit`: the arrays of a batch with their rows, which are `axis`, over the current mesh.

    Raises:
      ValueError: the rows do not divide.
    """
    mesh = current_mesh()

    def one(leaf: Any) -> Any:
        spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * leaf.ndim
        spec[: axis + 1] = [*[None] * axis, mesh_axes("batch", leaf.shape[axis])]
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*spec))

    return batch if mesh is None else jax.tree.map(one, batch)


def _spec(path: tuple[Any, ...], leaf: Any, mesh: Any) -> PartitionSpec:
    name = ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
    logical = _logical_axes(name)
    if len(leaf.shape) < len(logical):
        logical = ()
    rest = len(leaf.shape) - len(logical)
    try:
        axes = [mesh_axes(axis, size, mesh=mesh) for axis, size in zip(logical, leaf.shape[rest:], strict=True)]
    except ValueError as error:
        raise ValueError(f"{name} {list(leaf.shape)}: {error}") from None
    return _plain([*[None] * rest, *axes])


def _plain(axes: list[tuple[str, ...] | None]) -> PartitionSpec:
    """Written as the compiler writes what comes out of a program: an equal sharding of another form is compiled for."""
    while axes and axes[-1] is None:
        axes = axes[:-1]
    return PartitionSpec(*(one[0] if one is not None and len(one) == 1 else one for one in axes))


def _logical_axes(name: str) -> tuple[str | None, ...]:
    base = re.sub(r"\.lora_[ab]$", "", name)
    for candidate in (base,) if base == name else (base, f"{base}.kernel"):
        for pattern, logical in PARAMETERS:
            if re.search(rf"(^|\.)({pattern})$", candidate):
                if base == name:
                    return logical
                return (*logical[:-1], None) if name.endswith("a") else (*logical[:-2], None, logical[-1])
    return ()
