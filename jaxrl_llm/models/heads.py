"""Small heads on hidden states: numbers (value, reward, a score per token), classes, embeddings.

Every maker returns `(init, apply)`: `init(key) -> params`, `apply(params, hidden[..., D])`. A head works on the last
axis alone. A process reward is therefore a scalar head on all tokens, `apply(params, hidden)`, or on the ends of the
steps alone, `apply(params, hidden_at(hidden, ends))`; a sequence's reward is one on pooled states.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.functional import split_module
from jaxrl_llm.ops._checks import check_shapes, is_concrete
from jaxrl_llm.types import Params

Init = Callable[[jax.Array], Params]


class Head(nnx.Module):
    """`layers` linear maps with `activation` between them; all but the last one keep the width."""

    def __init__(
        self,
        width: int,
        out_width: int,
        layers: int,
        activation: Callable,
        rngs: nnx.Rngs,
        *,
        zero: bool = True,
        use_bias: bool = True,
    ) -> None:
        start = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
        self.hidden = nnx.List([nnx.Linear(width, width, use_bias=use_bias, rngs=rngs) for _ in range(layers - 1)])
        self.out = nnx.Linear(width, out_width, use_bias=use_bias, kernel_init=start, rngs=rngs)
        self.activation = activation

    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B O"]:
        for layer in self.hidden:
            hidden = self.activation(layer(hidden))
        return self.out(hidden).astype(jnp.float32)


def make_scalar_head(
    width: int, *, layers: int = 1, activation: Callable = jax.nn.relu
) -> tuple[Init, Callable[..., Float[Array, "*B"]]]:
    """A value or reward head as `(init(key) -> params, apply(params, hidden[..., D]) -> f32[...])`.

    The last map starts at zero. With `layers=2, activation=jax.nn.silu` it is BaseReward's head,
    `w2 . silu(W1 h + b1) + b2`, the best of the depths and activations that were compared (Zhang et al. 2025,
    arXiv 2509.16127).

    Raises:
      ValueError: a size is less than one.
    """
    _check_sizes(width=width, layers=layers)
    init, apply = split_module(lambda rngs: Head(width, 1, layers, activation, rngs))
    return init, lambda params, hidden: apply(params, hidden)[..., 0]


def make_classifier_head(
    width: int, num_classes: int, *, layers: int = 1, activation: Callable = jax.nn.tanh
) -> tuple[Init, Callable[..., Float[Array, "*B C"]]]:
    """A classifier as `(init, apply(params, hidden[..., D]) -> f32[..., C])`: logits, equal for all classes at the
    start. With `layers=2` it has the form of BERT's and RoBERTa's classifiers.

    Raises:
      ValueError: a size is less than one.
    """
    _check_sizes(width=width, num_classes=num_classes, layers=layers)
    return split_module(lambda rngs: Head(width, num_classes, layers, activation, rngs))


def make_projection_head(
    width: int, out_width: int, *, normalize: bool = False, use_bias: bool = False
) -> tuple[Init, Callable[..., Float[Array, "*B O"]]]:
    """A linear map to embeddings as `(init, apply(params, hidden[..., D]) -> f32[..., O])`.

    `normalize` divides by the Euclidean norm; a zero vector stays zero, with a zero gradient. Per token this is the
    projection of late interaction (Khattab and Zaharia 2020), on pooled states that of a dual encoder.

    Raises:
      ValueError: a size is less than one.
    """
    _check_sizes(width=width, out_width=out_width)
    init, apply = split_module(lambda rngs: Head(width, out_width, 1, jax.nn.relu, rngs, zero=False, use_bias=use_bias))

    def normalized(params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B O"]:
        projected = apply(params, hidden)
        square = jnp.sum(projected**2, axis=-1, keepdims=True)
        # the inner `where` keeps the derivative of the root at zero, which is infinite, out of the gradient
        return jnp.where(square > 0, projected * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)

    return init, normalized if normalize else apply


def hidden_at(hidden: Float[Array, "B T D"], positions: Int[Array, "B K"]) -> Float[Array, "B K D"]:
    """States at the given positions, such as the last token of each reasoning step; zeros where a position is -1,
    which stands for a step that did not take place.

    Raises:
      ValueError: shapes do not agree or, outside jit, a position lies outside [-1, T). Inside jit such a position
        counts as -1.
    """
    check_shapes(hidden=(hidden, "B T D"), positions=(positions, "B K"))
    length = hidden.shape[1]
    if is_concrete(positions) and positions.size and not -1 <= int(positions.min()) <= int(positions.max()) < length:
        raise ValueError(
            f"positions must lie in [0, {length}), or be -1 for none, got {int(positions.min())} to "
            f"{int(positions.max())}; hidden has {length} positions"
        )
    inside = (positions >= 0) & (positions < length)
    states = jnp.take_along_axis(hidden, jnp.where(inside, positions, 0)[..., None], axis=1)
    return jnp.where(inside[..., None], states, 0)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
