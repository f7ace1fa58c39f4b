"""A policy that may choose only from what another one finds likely (NLPO, Ramamurthy et al. 2022)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.models.attention import Cache
from jaxrl_llm.models.decoder import Model, output_logits
from jaxrl_llm.ops.logits import nucleus_mask
from jaxrl_llm.types import Params


@dataclasses.dataclass(frozen=True, eq=False)
class NucleusModel(Model):
    """Two sets of weights of one decoder, `{"policy", "masking"}`, that read the same tokens side by side.

    The sampler draws, and `score_rollout` scores, by the policy's logits among the tokens of the masking policy's
    nucleus. No gradient reaches the masking policy. Hidden states are those of both, one behind the other `[..., 2 D]`,
    and the cache has the layers of both. `nucleus_model` makes it.
    """

    base: Any = None
    top_p: float = 0.9
    always: tuple[int, ...] = ()

    def head(self, params: Params) -> Float[Array, "V D"]:
        """The policy's output matrix."""
        return self.base.head(params["policy"])

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype = jnp.float32) -> Cache:
        """Empty keys and values for both."""
        return [*self.base.init_cache(batch, length, dtype), *self.base.init_cache(batch, length, dtype)]

    def allowed(self, params: Params, hidden: Float[Array, "*B D"]) -> Bool[Array, "*B V"]:
        """The nucleus, from the masking policy's hidden states."""
        logits = output_logits(self.base, params["masking"], hidden)
        return nucleus_mask(logits, top_p=self.top_p, always=self.always)

    def allowed_logits(self, params: Params, hidden: Float[Array, "*B 2*D"]) -> Float[Array, "*B V"]:
        """The policy's logits where they are allowed, minus infinity elsewhere."""
        own, masking = jnp.split(hidden, 2, axis=-1)
        return jnp.where(self.allowed(params, masking), output_logits(self.base, params["policy"], own), -jnp.inf)

    def split_hidden(
        self, params: Params, hidden: Float[Array, "*B 2*D"]
    ) -> tuple[Float[Array, "*B D"], jax.tree_util.Partial, Int[Array, "*B"]]:
        """What `ops.token_logprobs` takes: the policy's hidden states, `allowed` and `states`."""
        own, masking = jnp.split(hidden, 2, axis=-1)
        rows = jax.lax.stop_gradient(masking.reshape(-1, masking.shape[-1]))
        allowed = jax.tree_util.Partial(_allowed_rows, jax.tree_util.Partial(self.allowed, params), rows)
        return own, allowed, jnp.arange(rows.shape[0]).reshape(own.shape[:-1])


def nucleus_model(model: Model, *, top_p: float = 0.9, always: tuple[int, ...] = ()) -> NucleusModel:
    """A policy of `model`'s sizes among the smallest set of the masking policy's tokens whose probability reaches
    `top_p` (`ops.nucleus_mask`), and the tokens `always`.

    Raises:
      ValueError: `top_p` outside (0, 1].
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")

    def apply(params: Params, tokens: Int[Array, "B T"], *, cache: Cache | None = None, **options: Any) -> Any:
        layers = None if cache is None else len(cache) // 2
        halves = (None, None) if cache is None else (cache[:layers], cache[layers:])
        own, own_cache = model.apply(params["policy"], tokens, cache=halves[0], **options)
        masking, masking_cache = model.apply(params["masking"], tokens, cache=halves[1], **options)
        both = jnp.concatenate([own, jax.lax.stop_gradient(masking)], axis=-1)
        return both, None if cache is None else [*own_cache, *masking_cache]

    def init(key: jax.Array) -> Params:
        params = model.init(key)
        return {"policy": params, "masking": params}

    return NucleusModel(model.config, init, apply, base=model, top_p=top_p, always=always)


def _allowed_rows(
    allowed: jax.tree_util.Partial, hidden: Float[Array, "N D"], rows: Int[Array, "M"]
) -> Bool[Array, "M V"]:
    return allowed(hidden[rows])
