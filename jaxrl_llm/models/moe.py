"""Mixture of experts: each token goes through the few feed-forward networks that a router picks for it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from jaxrl_kernels.mesh import mesh_axes, row_spec, split
from jaxrl_llm.models.activations import ACTIVATIONS
from jaxrl_llm.models.decoder_config import DecoderConfig


class Experts(nnx.Module):
    """A router and gated feed-forward networks with their matrices in three arrays.

    Tokens are sorted by expert, so that each expert multiplies one run of rows (`jax.lax.ragged_dot`); no token is
    ever dropped.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        count, inner = config.num_experts, config.expert_width or config.ffn_width

        def matrices(shape: tuple[int, int], gain: float) -> nnx.Param:
            draw = nnx.initializers.variance_scaling(gain, "fan_in", "truncated_normal", batch_axis=(0,))
            return nnx.Param(draw(rngs.params(), (count, *shape)))

        self.router = nnx.Linear(config.width, count, use_bias=False, rngs=rngs)
        self.gate = matrices((config.width, inner), 1.0)
        self.up = matrices((config.width, inner), 1.0)
        self.down = matrices((inner, config.width), 1 / (2 * config.num_layers))

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T E"]]:
        """The experts' weighted sum, and the router's logits in float32."""
        config = self.config
        router_logits = self.router(x).astype(jnp.float32)
        rows = row_spec(x.shape[:-1])
        experts, ffn = mesh_axes("experts", config.num_experts), mesh_axes("ffn", self.gate.shape[-1])
        into, out_of = P(experts, None, ffn), P(experts, ffn)
        local = functools.partial(self._mix, rows, experts, ffn)
        mix = split(local, (rows, rows, into, into, out_of), rows, check_vma=True)
        return mix(x, router_logits, self.gate[...], self.up[...], self.down[...]), router_logits

    def _mix(self, parts, experts, ffn, x, router_logits, gate, up, down):
        """The weighted sum of experts, of which this device has some, or a slice of each, or all.

        Devices that differ in their experts bring their tokens together, each does its own experts' share of all, and
        the sums go back to where the tokens came from.
        """
        config, shape, count = self.config, x.shape, gate.shape[0]
        x = x.reshape(-1, shape[-1])
        probabilities = jax.nn.softmax(router_logits, axis=-1).reshape(-1, config.num_experts)
        weights, chosen = jax.lax.top_k(probabilities, config.experts_per_token)
        if config.normalize_experts:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(x.dtype)
        together = experts is not None and experts[0] in (parts[0] or ())
        if together:
            x, weights, chosen = (jax.lax.all_gather(a, experts, tiled=True) for a in (x, weights, chosen))
        if experts is not None:
            chosen = chosen - jax.lax.axis_index(experts) * count
            chosen = jnp.where((chosen >= 0) & (chosen < count), chosen, count)  # sorted to the end, no one's rows
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=count)
        rows = x[order // config.experts_per_token]
        if experts is not None:  # what `ragged_dot` and its gradient say of rows of no group is not defined
            rows = jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None], rows, 0)
        gated = ACTIVATIONS[config.activation](jax.lax.ragged_dot(rows, gate, sizes))
        rows = jax.lax.ragged_dot(gated * jax.lax.ragged_dot(rows, up, sizes), down, sizes)
        outputs = rows[jnp.argsort(order)].reshape(*chosen.shape, -1)
        if experts is not None:
            outputs = jnp.where((chosen < count)[..., None], outputs, 0)
        mixed = jnp.einsum("nk,nkd->nd", weights, outputs)
        if ffn is not None:
            mixed = jax.lax.psum(mixed, ffn)
        if together:
            mixed = jax.lax.psum_scatter(mixed, experts, tiled=True)
        elif experts is not None:
            mixed = jax.lax.psum(mixed, experts)
        return mixed.reshape(shape)


def load_balancing_loss(
    router_logits: Float[Array, "*L E"], *, experts_per_token: int, mask: Bool[Array, "*L"] | None = None
) -> Float[Array, ""]:
    """`E * sum_e share_e * probability_e`, the auxiliary loss of Fedus et al. 2021, equations 4 to 6.

    `share_e` is the number of tokens sent to expert e (of `experts_per_token` each) and `probability_e` the router's
    mean probability for it, both over all leading axes together (layers, sequences, tokens) where `mask` is true. It is
    `experts_per_token` when the experts are in balance, and more otherwise. Get the logits from
    `model.apply(..., router_logits=True)`.

    Raises:
      ValueError: the mask does not fit, or a token has fewer than one or more than E experts.
    """
    num_experts = router_logits.shape[-1]
    if mask is not None and mask.shape != router_logits.shape[:-1]:
        raise ValueError(f"mask must have shape {router_logits.shape[:-1]} like the tokens, got {mask.shape}")
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(f"experts_per_token={experts_per_token} must lie between 1 and the {num_experts} experts")
    probabilities = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    _, chosen = jax.lax.top_k(probabilities, experts_per_token)
    sent = jnp.sum(jax.nn.one_hot(chosen, num_experts), axis=-2)
    counted = jnp.ones(router_logits.shape[:-1]) if mask is None else mask.astype(jnp.float32)
    total = jnp.maximum(jnp.sum(counted), 1)
    axes = tuple(range(router_logits.ndim - 1))
    share = jnp.sum(sent * counted[..., None], axis=axes) / total
    probability = jnp.sum(probabilities * counted[..., None], axis=axes) / total
    return num_experts * jnp.sum(share * probability)
