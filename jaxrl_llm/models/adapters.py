"""Adapters: a few trainable numbers beside a frozen model, each kind a parameter pytree of its own.

| kind | trains | used as |
| --- | --- | --- |
| LoRA | a low-rank term of chosen matrices | `merge_lora` into the weights, or `apply_lora` beside them |
| IA3 | scales of keys, values and feed-forward units | `merge_ia3` into the weights |
| prefix | keys and values before the sequence | `apply_prefix` |
| prompt | embeddings before the sequence | `prompt_prefix`, which gives the prefix that they amount to |

To train an adapter, differentiate with respect to it alone and keep the base out of the gradient; the reference policy
is then the base itself, with no second copy:

    tuned = apply_lora(model, config)
    loss = lambda adapter: objective(tuned, {"base": params, "lora": adapter})     # beside the weights
    loss = lambda adapter: objective(model, merge_lora(params, adapter, config))   # into the weights

Merging costs a sum over each matrix, once: it is for long sampling and for what leaves the library (`models.save`).
Unmerged, the gradient never holds an array as large as a weight matrix. Adapters nest: the base of a prefix may be a
model with LoRA. LoRA itself is in `lora.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.attention import write_cache
from jaxrl_llm.models.decoder import Cache, Model, replace_prefix
from jaxrl_llm.models.weights import count_params
from jaxrl_llm.ops._checks import check_ids_below
from jaxrl_llm.types import Params

Path = tuple[str, ...]

# How many numbers an adapter trains.
trainable_count = count_params


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedModel(Model):
    """A model with an adapter beside it; its parameters are `{"base": those of inner, KIND: the adapter}`."""

    inner: Model = dataclasses.field(kw_only=True)
    prefix_length: int = 0

    def head(self, params: Params) -> Float[Array, "V D"]:
        """The output matrix, that of the base."""
        return self.inner.head(params["base"])

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype = jnp.float32) -> Cache:
        """Empty keys and values for `length` positions of `batch` sequences, and room for the prefix before them."""
        return self.inner.init_cache(batch, length + self.prefix_length, dtype)


def adapted_model(inner: Model, kind: str, init: Callable, apply: Callable, **fields: Any) -> AdaptedModel:
    """A model whose `apply` hands `apply(base, adapter, *args, **kwargs)` the parts of `{"base": ..., kind: ...}`; the
    rest is as in `inner`."""

    def apply_both(params: Params, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(params, dict) or set(params) != {"base", kind}:
            got = sorted(params) if isinstance(params, dict) else type(params).__name__
            raise ValueError(f'parameters must be {{"base": ..., "{kind}": ...}}, got {got}')
        return apply(params["base"], params[kind], *args, **kwargs)

    same = {field.name: getattr(inner, field.name) for field in dataclasses.fields(Model)}
    return AdaptedModel(**same | {"init": init, "apply": apply_both, "inner": inner, **fields})


def find_targets(params: Params, targets: Sequence[str]) -> list[Path]:
    """The paths, in order, of the matrices (linear layers and stacks of experts) whose dotted name ends in a target.

    Raises:
      ValueError: a target matches none; the message lists the names that there are.
    """
    flat = {tuple(map(str, path)): leaf for path, leaf in flatten_dict(params).items()}
    paths = [path[:-1] for path, leaf in flat.items() if path[-1] == "kernel" and len(leaf.shape) >= 2]
    paths += [path for path, leaf in flat.items() if path[-1] != "kernel" and len(leaf.shape) >= 3]
    found = set()
    for target in targets:
        matches = [path for path in paths if re.fullmatch(rf"(?:.*\.)?(?:{target})", ".".join(path))]
        if not matches:
            names = sorted({".".join(part for part in path if not part.isdigit()) for path in paths})
            raise ValueError(f"target {target!r} matches no matrix of the model; there are {', '.join(names)}")
        found.update(matches)
    return sorted(found)


def matrix_path(flat: Mapping[Path, Any], path: Path) -> Path:
    """Where the matrix of a linear layer, or a stack of experts, lies among flattened parameters."""
    return path if path in flat else (*path, "kernel")


def init_ia3(
    params: Params,
    *,
    outputs: Sequence[str] = ("key", "value"),
    inputs: Sequence[str] = ("down",),
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """Scales, all one, of what the `outputs` matrices give and the `inputs` matrices receive (Liu et al. 2022).

    Targets are written as in `LoraConfig`. Where a model norms its keys (Qwen3), they are scaled before that norm.

    Raises:
      ValueError: a target matches no matrix.
    """
    flat = flatten_dict(params)
    scales = {}
    for name, axis, targets in (("output_scale", -1, outputs), ("input_scale", -2, inputs)):
        for path in find_targets(params, targets) if targets else []:
            *stack, _, _ = shape = flat[matrix_path(flat, path)].shape
            scales[*path, name] = jnp.ones((*stack, shape[axis]), dtype)
    return unflatten_dict(scales)


def merge_ia3(params: Params, adapter: Params) -> Params:
    """The parameters with the scales multiplied into rows, columns and biases: the adapted model, exactly.

    Differentiable; it is also how the adapter is trained, as it costs one product over each scaled matrix.

    Raises:
      ValueError: the adapter does not fit the parameters.
    """
    flat = flatten_dict(params)
    merged = dict(flat)
    for (*path, name), scale in flatten_dict(adapter).items():
        place = matrix_path(flat, tuple(path))
        axis = {"output_scale": -1, "input_scale": -2}.get(name)
        if axis is None or place not in flat or scale.shape != (*flat[place].shape[:-2], flat[place].shape[axis]):
            raise ValueError(
                f"the adapter's {'.'.join([*path, name])} of shape {scale.shape} does not fit "
                f"{flat[place].shape if place in flat else 'the model, which has no such matrix'}; "
                "was it made for another model?"
            )
        other_axis = -2 if axis == -1 else -1
        merged[place] = (merged[place] * jnp.expand_dims(scale, other_axis)).astype(flat[place].dtype)
        bias = (*path, "bias")
        if name == "output_scale" and bias in flat:
            merged[bias] = (flat[bias] * scale).astype(flat[bias].dtype)
    return unflatten_dict(merged)


def init_prefix(model: Model, params: Params, tokens: Int[Array, "N"]) -> Params:
    """Keys and values of N positions, to be trained (Li and Liang 2021), as `tokens` have them: the start from the
    activations of real words that the paper found best with little data. They are trained as they are, without the
    paper's network in front of them.

    Returns:
      per layer, `layers.0.keys [KV, D, N]` and `layers.0.values [KV, N, D]`.
    """
    _check_start(tokens, model.head(params).shape[0])
    return jax.tree.map(lambda x: x.astype(jnp.float32), _prefix_of(model, params, tokens))


def apply_prefix(model: Model, length: int) -> AdaptedModel:
    """The decoder with a prefix of `length` keys and values that every token sees; positions shift behind it.

    Parameters are `{"base": params, "prefix": prefix}`. Callers count positions from 0, as without a prefix: the shift
    and the room in the cache are added here. A sliding window moves away from the prefix as from any other position.

    Raises (when applied):
      ValueError: the prefix has another length; `segment_ids` are given, as a prefix stands before a row and not before
        each of its segments (pad rows and leave them unpacked); `positions` are given without a cache.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")

    def init(key: jax.Array) -> Params:
        base_key, token_key = jax.random.split(key)
        base = model.init(base_key)
        tokens = jax.random.randint(token_key, (length,), 0, model.head(base).shape[0])
        return {"base": base, "prefix": init_prefix(model, base, tokens)}

    def apply(base, prefix, tokens, *, positions=None, segment_ids=None, cache=None, **kwargs):
        if segment_ids is not None:
            raise ValueError("a prefix cannot stand before each packed segment: pass padded rows, without segment_ids")
        if cache is None and positions is not None:
            raise ValueError("with a prefix and without a cache, positions are 0, 1, ...: leave them out")
        batch, steps = tokens.shape
        in_use = cache if cache is not None else model.init_cache(batch, length + steps, model.head(base).dtype)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(steps), tokens.shape)
        in_use = _put_prefix(in_use, prefix, batch, length)
        positions = jnp.where(positions >= 0, positions + length, positions)
        hidden, in_use, *rest = model.apply(base, tokens, positions=positions, cache=in_use, **kwargs)
        return hidden, None if cache is None else in_use, *rest

    return adapted_model(model, "prefix", init, apply, prefix_length=length)


def init_prompt(params: Params, tokens: Int[Array, "N"]) -> Float[Array, "N D"]:
    """Embeddings of N positions, to be trained (Lester et al. 2021), as `tokens` have them. They are rows like those of
    the embedding matrix, so that Gemma's scale is still to come."""
    _check_start(tokens, params["embedding"].shape[0])
    return params["embedding"][tokens].astype(jnp.float32)


def prompt_prefix(model: Model, params: Params, prompt: Float[Array, "N D"]) -> Params:
    """The prefix that a prompt of embeddings amounts to: its keys and values, a function of it and differentiable.

    `apply_prefix(model, N)` takes it: `{"base": params, "prefix": prompt_prefix(model, params, prompt)}`. The prompt is
    thus computed once for all rows, and once for a whole rollout; the embedding and a head tied to it stay untouched.

    Raises:
      ValueError: the prompt's width is not that of the embedding.
    """
    width = params["embedding"].shape[1]
    if prompt.ndim != 2 or prompt.shape[1] != width:
        raise ValueError(f"prompt must have shape [N, {width}], got {list(prompt.shape)}")
    # the prompt's rows take the place of the vocabulary's, and the tokens 0, 1, ... name them in order
    return _prefix_of(model, params | {"embedding": prompt}, jnp.arange(prompt.shape[0]))


def _prefix_of(model: Model, params: Params, tokens: Int[Array, "N"]) -> Params:
    cache = model.init_cache(1, tokens.shape[0], model.head(params).dtype)
    _, cache = model.apply(params, tokens[None], cache=cache)
    return {"layers": {str(i): {name: x[0] for name, x in layer.items()} for i, layer in enumerate(cache)}}


def _put_prefix(cache: Cache, prefix: Params, batch: int, length: int) -> Cache:
    layers = [prefix["layers"][str(i)] for i in range(len(cache))]
    if layers[0]["values"].shape[-2] != length:
        raise ValueError(f"the prefix has {layers[0]['values'].shape[-2]} positions, the model was made for {length}")
    rows = [
        {name: jnp.broadcast_to(x.astype(old[name].dtype), (batch, *x.shape)) for name, x in layer.items()}
        for layer, old in zip(layers, cache, strict=True)
    ]
    if "page_table" in cache[0]:  # rows that share a first page write the same into it
        places = jnp.broadcast_to(jnp.arange(length), (batch, length))
        return [
            write_cache(old, jnp.moveaxis(row["keys"], -1, 1), jnp.moveaxis(row["values"], -2, 1), places)
            for old, row in zip(cache, rows, strict=True)
        ]
    return replace_prefix(cache, rows, jnp.ones(batch, bool))


def _check_start(tokens: Int[Array, "N"], vocab_size: int) -> None:
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(f"tokens must be one row of at least one token id, got shape {list(tokens.shape)}")
    check_ids_below("tokens", tokens, vocab_size)
