"""Low-rank adaptation (Hu et al. 2021): merged into the weights, beside them, and in the files of PEFT."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from safetensors import safe_open

from jaxrl_llm.models.adapters import AdaptedModel, Path, adapted_model, find_targets, matrix_path
from jaxrl_llm.models.checkpoint import Stored, parse_json, read_header
from jaxrl_llm.models.decoder import Decoder, Model, make_decoder
from jaxrl_llm.models.functional import split_module
from jaxrl_llm.models.hub import FAMILIES
from jaxrl_llm.models.stacking import stack_layers, stacked_name, unstack_layers
from jaxrl_llm.models.weights import save_params
from jaxrl_llm.types import Params

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # what PEFT puts before the names of the model it wraps


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation, `W + scale * A B` (Hu et al. 2021).

    Attributes:
      rank: columns of A and rows of B.
      alpha: the update is scaled by `alpha / rank`, or by `alpha / sqrt(rank)` if `rank_stabilized`, which keeps its
        size from shrinking with the rank (Kalajdzievski 2023).
      targets: which matrices: regular expressions that match the end of a dotted name, whole parts only. `"query"`
        means the queries of every layer, `"layers.0.down"` one matrix, `"gate|up|down"` the feed-forward networks.

    Raises:
      ValueError: the rank is less than one, alpha is not positive, or there are no targets.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(f'targets must be a tuple of names such as ("query", "value"), got {self.targets!r}')

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


def init_lora(key: jax.Array, params: Params, config: LoraConfig, *, dtype: DTypeLike = jnp.float32) -> Params:
    """A fresh adapter for the matrices of `params` (arrays or shapes) that the config targets.

    Returns:
      nested dicts with `lora_a: [in, rank]` (uniform within `1 / sqrt(in)`) and `lora_b: [rank, out]` (zero, so that
      nothing changes yet) where the matrix lies; a stack of matrices (experts) gets a stack.

    Raises:
      ValueError: a target matches no matrix (the message lists them), or the rank exceeds a side of a matrix.
    """
    flat = flatten_dict(params)
    chosen = find_targets(params, config.targets)
    adapter = {}
    for own, path in zip(jax.random.split(key, len(chosen)), chosen, strict=True):
        *stack, width, out_width = flat[matrix_path(flat, path)].shape
        if config.rank > min(width, out_width):
            raise ValueError(f"rank {config.rank} exceeds {'.'.join(path)}, a matrix [{width}, {out_width}]")
        bound = width**-0.5
        adapter[*path, "lora_a"] = jax.random.uniform(own, (*stack, width, config.rank), dtype, -bound, bound)
        adapter[*path, "lora_b"] = jnp.zeros((*stack, config.rank, out_width), dtype)
    return unflatten_dict(adapter)


def merge_lora(params: Params, adapter: Params, config: LoraConfig) -> Params:
    """The parameters with `scale * A B` added to each adapted matrix, in float32 and rounded once to its type.

    Differentiable in both arguments. Merging the adapter with `lora_b` negated takes it out again, up to rounding.

    Raises:
      ValueError: the adapter does not fit the parameters or the config.
    """
    flat, parts = flatten_dict(params), flatten_dict(adapter)
    merged = dict(flat)
    for path in _adapted_paths(flat, parts, config):
        place, a, b = matrix_path(flat, path), parts[*path, "lora_a"], parts[*path, "lora_b"]
        update = jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
        merged[place] = (flat[place] + config.scale * update).astype(flat[place].dtype)
    return unflatten_dict(merged)


def apply_lora(model: Model, config: LoraConfig) -> AdaptedModel:
    """The decoder with the adapter beside its matrices: `y = x W + scale * (x A) B`.

    Parameters are `{"base": params, "lora": adapter}`. The gradient with respect to the adapter needs no array of a
    matrix's size. Everything that takes a model takes this one. For sampling many tokens, merge.

    Raises:
      ValueError: a target matches no linear layer of the decoder, or it means a stack of experts.
    """
    _, apply_joined = split_module(lambda rngs: add_lora(Decoder(model.config, rngs), config))

    def init(key: jax.Array) -> Params:
        base_key, lora_key = jax.random.split(key)
        base = model.init(base_key)
        return {"base": base, "lora": init_lora(lora_key, base, config)}

    def apply(base: Params, adapter: Params, *args: Any, **kwargs: Any) -> Any:
        flat, parts = flatten_dict(base), flatten_dict(adapter)
        _adapted_paths(flat, parts, config)
        return apply_joined(unflatten_dict(flat | parts), *args, **kwargs)

    return adapted_model(model, "lora", init, apply)


class LoraLinear(nnx.Linear):
    """A linear layer with a low-rank term beside it. `kernel` and `bias` have the names they had without it."""

    def __init__(self, linear: nnx.Linear, config: LoraConfig) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            use_bias=linear.use_bias,
            dtype=linear.dtype,
            param_dtype=linear.param_dtype,
            precision=linear.precision,
            dot_general=linear.dot_general,
            promote_dtype=linear.promote_dtype,
            preferred_element_type=linear.preferred_element_type,
            rngs=nnx.Rngs(0),
        )
        self.lora_a = nnx.Param(jnp.zeros((linear.in_features, config.rank)))
        self.lora_b = nnx.Param(jnp.zeros((config.rank, linear.out_features)))
        self.scale = config.scale

    def __call__(self, inputs: Float[Array, "*B I"], out_sharding: Any = None) -> Float[Array, "*B O"]:
        outputs = super().__call__(inputs, out_sharding)
        narrow = inputs.astype(self.lora_a[...].dtype) @ self.lora_a[...]
        return outputs + (self.scale * (narrow @ self.lora_b[...])).astype(outputs.dtype)


def add_lora(module: nnx.Module, config: LoraConfig) -> nnx.Module:
    """Puts a `LoraLinear` in the place of each targeted linear layer of a module that was just built.

    What `apply_lora` does for a decoder, for modules of another kind:
    `split_module(lambda rngs: add_lora(MyModule(rngs), config))`; its parameters are the module's and the adapter's in
    one tree.

    Raises:
      ValueError: a target names a matrix that is no linear layer (a stack of experts).
    """
    parts: dict[tuple[Any, ...], Any] = dict(nnx.iter_modules(module))
    linears = {tuple(map(str, path)): path for path, part in parts.items() if isinstance(part, nnx.Linear)}
    for name in find_targets(nnx.to_pure_dict(nnx.state(module, nnx.Param)), config.targets):
        if name not in linears:
            raise ValueError(
                f"{'.'.join(name)} is a stack of experts, which has no unmerged form: train through merge_lora, or "
                "target other matrices"
            )
        place = linears[name]
        parent, adapted = parts[place[:-1]], LoraLinear(parts[place], config)
        if isinstance(parent, nnx.List):
            parent[place[-1]] = adapted
        else:
            setattr(parent, place[-1], adapted)
    return module


def _adapted_paths(flat: dict[Path, Any], parts: dict[Path, Any], config: LoraConfig) -> list[Path]:
    """The paths of the matrices that an adapter changes, after comparing all shapes."""
    paths = sorted({path[:-1] for path in parts})
    for path in paths:
        matrix = flat.get(matrix_path(flat, path))
        a, b = parts.get((*path, "lora_a")), parts.get((*path, "lora_b"))
        if matrix is None or a is None or b is None:
            raise ValueError(
                f"the adapter has {sorted(p[-1] for p in parts if p[:-1] == path)} for {'.'.join(path)}, which must be "
                "a matrix of the model, with lora_a and lora_b; was the adapter made for another model?"
            )
        *stack, width, out_width = matrix.shape
        wanted = (*stack, width, config.rank), (*stack, config.rank, out_width)
        if (a.shape, b.shape) != wanted:
            raise ValueError(
                f"the adapter of {'.'.join(path)} has shapes {a.shape} and {b.shape}, a matrix {matrix.shape} and rank "
                f"{config.rank} want {wanted[0]} and {wanted[1]}"
            )
    return paths


# ------------------------------------------------------------------------------------------------------ files of PEFT


def save_lora(
    adapter: Params, config: LoraConfig, model: Model, path: str | FilePath, *, base: str | None = None
) -> None:
    """Writes the folder that `peft.PeftModel.from_pretrained(base_model, path)` reads.

    Args:
      model: the one that the adapter belongs to, with its `family` (loaded models have it): it says what the matrices
        are called outside.
      path: a folder, made if need be; the two files of an adapter in it are replaced.
      base: hub id or folder of the base model, recorded in the config.

    Raises:
      ValueError: the adapter does not fit the model; or it changes a matrix that is only a part of a tensor outside
        (Phi-3's fused ones) or is stacked from several (experts).
    """
    if getattr(model.config, "scan_layers", False):
        adapter, model = unstack_layers(adapter, model.config), _one_by_one(model)
    stored = _stored(model)
    names = _outside_names(stored)
    parts = flatten_dict(adapter)
    paths = _adapted_paths(flatten_dict(jax.eval_shape(model.init, jax.random.key(0))), parts, config)
    if inexpressible := [".".join(place) for place in paths if place not in names]:
        raise ValueError(
            f"{inexpressible[:5]} share a tensor with other matrices in {model.family}, or are stacks of experts: PEFT "
            "has no adapter for them; merge_lora and save the merged model"
        )
    tensors = {}
    for place in paths:
        tensors[f"{PREFIX}{names[place]}.lora_A.weight"] = parts[*place, "lora_a"].T
        tensors[f"{PREFIX}{names[place]}.lora_B.weight"] = parts[*place, "lora_b"].T
    everything = {name.removesuffix(".weight") for place in stored.values() for name in place.names}
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if "CausalLM" in str(model.family) else None,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": alpha,
        "use_rslora": config.rank_stabilized,
        "target_modules": _shortest({names[place] for place in paths}, everything),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder = FilePath(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_params(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def load_lora(path: str | FilePath, model: Model, *, dtype: DTypeLike = jnp.float32) -> tuple[Params, LoraConfig]:
    """Reads an adapter that PEFT or `save_lora` wrote, for a model of the family it was trained on.

    Dropout, which matters in training alone, is left out.

    Raises:
      ValueError: a file is missing or cut short; the adapter is of another kind than plain LoRA (DoRA, ranks that
        differ, trained biases or whole modules); tensors are missing, unknown to the model or of a wrong shape.
    """
    if getattr(model.config, "scan_layers", False):
        adapter, config = load_lora(path, _one_by_one(model), dtype=dtype)
        targets = tuple(sorted({stacked_name(target, model.config) for target in config.targets}))
        return stack_layers(adapter, model.config), dataclasses.replace(config, targets=targets)
    folder = FilePath(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; expected a folder that PEFT or save_lora wrote")
    settings = parse_json(folder / CONFIG)
    _check_plain(settings, folder / CONFIG)
    places = {name: path for path, name in _outside_names(_stored(model)).items()}
    parts: dict[Path, Array] = {}
    unknown = []
    read_header(folder / WEIGHTS)  # says so if the file is cut short
    with safe_open(str(folder / WEIGHTS), framework="flax") as file:
        for name in file.keys():
            module, _, half = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            if module in places and half in ("lora_A", "lora_B"):
                parts[*places[module], half.lower()] = jnp.asarray(file.get_tensor(name).T, dtype)
            else:
                unknown.append(name)
    if unknown or not parts:
        raise ValueError(
            f"{folder / WEIGHTS} has {len(unknown)} tensors for which {model.family} has no place: "
            f"{', '.join(sorted(unknown)[:5])}; was it trained on another model?"
        )
    chosen, known = ({".".join(path) for path in paths} for paths in ({path[:-1] for path in parts}, places.values()))
    config = LoraConfig(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        targets=tuple(_shortest(chosen, known)),
        rank_stabilized=bool(settings.get("use_rslora")),
    )
    _adapted_paths(flatten_dict(jax.eval_shape(model.init, jax.random.key(0))), parts, config)
    return unflatten_dict(parts), config


def _one_by_one(model: Model) -> Model:
    """The model with its layers not stacked, as files have them."""
    plain = make_decoder(dataclasses.replace(model.config, scan_layers=False))
    return dataclasses.replace(plain, family=model.family)


def _stored(model: Model) -> Mapping[str, Stored]:
    """Where the family of a model keeps its parameters."""
    if model.family not in FAMILIES:
        raise ValueError(
            f"the model's family is {model.family!r}, so that nothing says what its matrices are called outside; load "
            'the model, or name it: dataclasses.replace(model, family="LlamaForCausalLM"); known are '
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model.family].stored(model.config)


def _outside_names(stored: Mapping[str, Stored]) -> dict[Path, str]:
    """What Hugging Face calls the linear layers, by our path: those that are a tensor of their own."""
    return {
        tuple(name.split(".")[:-1]): place.names[0].removesuffix(".weight")
        for name, place in stored.items()
        if name.endswith(".kernel") and place.transpose and place.rows is None and len(place.names) == 1
    }


def _shortest(chosen: Collection[str], known: Collection[str]) -> list[str]:
    """The last parts of the chosen dotted names; whole names where a part would mean more than was chosen."""
    last = {name: name.rpartition(".")[2] for name in known}
    loose = {last[name] for name in known if name not in chosen}
    return sorted({name if last[name] in loose else last[name] for name in chosen})


def _check_plain(settings: Mapping[str, Any], path: FilePath) -> None:
    """Refuses what would make the model another one than `W + scale * A B`."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {settings.get('peft_type')!r}, expected 'LORA'")
    for name in ("r", "lora_alpha"):
        if isinstance(settings.get(name), bool) or not isinstance(settings.get(name), int | float):
            raise ValueError(f"{path}: {name} must be a number, got {settings.get(name)!r}")
    plain = {"bias": "none", "fan_in_fan_out": False}
    extras = (
        "use_dora rank_pattern alpha_pattern modules_to_save lora_bias layer_replication trainable_token_indices "
        "target_parameters alora_invocation_tokens use_qalora use_bdlora arrow_config kasa_config "
        "monteclora_config velora_config"
    )
    odd = [name for name, value in plain.items() if settings.get(name, value) != value]
    if odd := odd + [name for name in extras.split() if settings.get(name)]:
        raise ValueError(
            f"{path}: {', '.join(f'{name}={settings[name]!r}' for name in odd)} is not supported: only plain LoRA is; "
            "merge the adapter with PEFT (merge_and_unload) and load the merged model"
        )
