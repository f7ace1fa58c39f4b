"""Small heads on hidden states."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxrl_llm.models.functional import split_module
from jaxrl_llm.types import Params


class ScalarHead(nnx.Module):
    """`layers` linear maps with `activation` between them; the last one maps to a number and starts at zero."""

    def __init__(self, width: int, layers: int, activation: Callable, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(layers - 1)])
        self.out = nnx.Linear(width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.activation = activation

    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        for layer in self.hidden:
            hidden = self.activation(layer(hidden))
        return self.out(hidden)[..., 0]


def make_scalar_head(
    width: int, *, layers: int = 1, activation: Callable = jax.nn.relu
) -> tuple[Callable[[jax.Array], Params], Callable[..., Float[Array, "*B"]]]:
    """A value or reward head as `(init(key) -> params, apply(params, hidden[..., D]) -> f32[...])`.

    Raises:
      ValueError: `layers` is less than one.
    """
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    return split_module(lambda rngs: ScalarHead(width, layers, activation, rngs))
