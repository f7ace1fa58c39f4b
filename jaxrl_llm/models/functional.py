"""From a Flax NNX module to the seam that everything else sees: a pure function and a pytree of parameters.

Modules are split once, at construction. Steps are then plain `jax.jit` over nested dicts, which dispatches several
times faster than graph-mode `nnx.jit` for small models and lets a reference policy or an average be just another
pytree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.types import Params

Module = TypeVar("Module", bound=nnx.Module)


def split_module(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable[[jax.Array], Params], Callable[..., Any]]:
    """Splits a module that `make(rngs)` builds into `(init, apply)`.

    `init(key) -> params` draws parameters as nested dicts with string keys; `apply(params, *args, **kwargs)` calls the
    module. Nothing is allocated until `init` is called, and both are safe under `jit`, `grad` and `vmap`.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(_Keys(jax.random.key(0)))), nnx.Param)
    template = nnx.to_pure_dict(abstract)

    def init(key: jax.Array) -> Params:
        return _match(nnx.to_pure_dict(nnx.state(make(_Keys(key)), nnx.Param)), str)

    def apply(params: Params, *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(graphdef, _like(template, params))(*args, **kwargs)

    return init, apply


def stack_modules(make: Callable[[nnx.Rngs], Module], count: int, rngs: Any) -> Module:
    """`count` modules that `make(rngs)` builds as one, whose parameters have a new first axis.

    They are drawn one after another, with the numbers that each would have by itself. `rngs` are those that a module
    gets from `split_module`.
    """
    key, before, taken = rngs.key, rngs.count, 0

    def first() -> Module:
        nonlocal taken
        keys = _Keys(key, before)
        module = make(keys)
        taken = keys.count - before
        return module

    def draw(i: jax.Array) -> Any:
        return nnx.state(make(_Keys(key, before + i * taken)), nnx.Param)

    module = nnx.eval_shape(first)
    nnx.update(module, jax.lax.map(draw, jnp.arange(count)))
    rngs.count = before + count * taken
    return module


class _Keys(nnx.Rngs):
    """The keys that `nnx.Rngs(params=key)` gives, counted in Python.

    `nnx.Rngs` counts in a variable, and to change one under `jax.eval_shape` costs by the length of the trace: 48
    layers of a decoder took 14 s to build abstractly, and take 2 s so.
    """

    def __init__(self, key: jax.Array, count: Any = -1) -> None:
        self.key, self.count = key, count

    def params(self) -> jax.Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count)


def _match(tree: Any, key_type: Callable[[Any], Any]) -> Any:
    return {key_type(k): _match(v, key_type) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _like(template: Any, params: Any) -> Any:
    """Gives `params` the key types of the module: list entries are integers in NNX, strings in files and
    checkpoints."""
    if not isinstance(template, dict):
        return params
    if not isinstance(params, dict) or {str(k) for k in template} != set(params):
        got = sorted(params) if isinstance(params, dict) else type(params).__name__
        raise ValueError(f"parameters do not fit the module: expected entries {sorted(map(str, template))}, got {got}")
    return {k: _like(v, params[str(k)]) for k, v in template.items()}
