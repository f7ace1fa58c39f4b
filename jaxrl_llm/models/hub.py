"""Models in and out of Hugging Face folders: `load` what the hub has, `save` what transformers and vLLM read."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from jaxrl_llm.models import encoder_families, families
from jaxrl_llm.models.checkpoint import (
    INDEX,
    TYPES,
    WEIGHTS,
    Family,
    Stored,
    Tensor,
    compare,
    parse_json,
    read_headers,
    read_piece,
    rename,
    stored_shapes,
    write_file,
)
from jaxrl_llm.models.decoder import Model
from jaxrl_llm.models.decoder_config import DecoderConfig
from jaxrl_llm.models.download import SIDE_FILES, WEIGHT_FILES, fetch
from jaxrl_llm.models.tokenizer import FILES as TOKENIZER_FILES
from jaxrl_llm.models.tokenizer import Tokenizer, load_tokenizer
from jaxrl_llm.types import Params

FAMILIES: dict[str, Family] = {**families.FAMILIES, **encoder_families.FAMILIES}

Sharding = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint.

    Raises:
      ValueError: there is none, or it is not JSON.
    """
    if (folder / "config.json").is_file():
        return parse_json(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter and no model; load the model that its adapter_config.json names")
    raise ValueError(f"{folder} has no config.json, so it is no checkpoint of a model; give the folder that has one")


def find_family(source: Mapping[str, Any]) -> tuple[str, Family]:
    """The first architecture of a config.json that we have, and its family.

    Raises:
      ValueError: we have none of them; the message lists those we have.
    """
    named = source.get("architectures") or []
    for name in named:
        if name in FAMILIES:
            return name, FAMILIES[name]
    supported = f"supported are {', '.join(sorted(FAMILIES))}"
    if not named:
        raise ValueError(f"config.json names no architecture; {supported}")
    raise ValueError(f"architecture {', '.join(map(repr, named))} is not supported; {supported}")


def build(source: Mapping[str, Any]) -> tuple[str, Family, Model]:
    """The model that a config.json describes, without parameters, its architecture and family.

    Raises:
      ValueError: the architecture or an option is not supported, or a field is missing.
    """
    name, family = find_family(source)
    try:
        return name, family, family.make_model(family.config_from(dict(source)))
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}, which {name} needs") from error


def parameter_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters by dotted name. Nothing is allocated."""
    tree = jax.eval_shape(model.init, jax.random.key(0))
    return {name: leaf.shape for name, leaf in flatten_dict(tree, sep=".").items()}


def load(
    path_or_hub_id: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    sharding: Sharding | None = None,
    scan_layers: bool = False,
) -> Model:
    """A model with its parameters and tokenizer, from a folder or a hub id.

    Each device's piece of each parameter is read by itself, so that the host never holds more than one parameter
    beside what its devices keep. Everything is checked before the first parameter is read.

    Args:
      path_or_hub_id: a folder with config.json and safetensors, or a model of the hub such as
        `Qwen/Qwen2.5-0.5B-Instruct`.
      dtype: floating type of the parameters, whatever type they are stored in.
      sharding: where the parameters go: one sharding for all, a function of a parameter's dotted name and shape, or
        None for the default device.
      scan_layers: of a decoder, as in `DecoderConfig`: its parameters are stacked as they are read.

    Raises:
      ValueError: the architecture is not supported, or its layers cannot be scanned; tensors are missing, left over, of
        another shape or of another type (all are listed); a file is cut short or absent; the hub cannot be reached; a
        parameter cannot be sharded so.
    """
    if jnp.dtype(dtype) not in TYPES.values():
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {jnp.dtype(dtype)}")
    folder = fetch(path_or_hub_id)
    source = read_config(folder)
    name, family, model = build(source)
    if scan_layers:
        if not isinstance(model.config, DecoderConfig):
            raise ValueError(f"scan_layers=True is for decoders, {folder} holds a {name}")
        model = family.make_model(dataclasses.replace(model.config, scan_layers=True))
    stored, shapes = family.stored(model.config), parameter_shapes(model)
    tensors = rename(read_headers(folder), family.renamed)
    differences = compare(stored_shapes(stored, shapes), tensors, family.ignored)
    if any(differences):
        raise ValueError(f"the tensors of {folder} are not those of its config.json: {differences.describe()}")
    tokenizer = load_tokenizer(folder) if any((folder / file).is_file() for file in TOKENIZER_FILES) else None
    flat = {
        key: _read_parameter(key, stored[key], tensors, shape, jnp.dtype(dtype), sharding)
        for key, shape in shapes.items()
    }
    return dataclasses.replace(
        model,
        params=unflatten_dict(flat, sep="."),
        tokenizer=tokenizer,
        family=name,
        source=source,
    )


def _read_parameter(
    name: str,
    place: Stored,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding | None,
) -> jax.Array:
    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        return read_piece(place, tensors, shape, index or (slice(None),) * len(shape), dtype)

    if sharding is None:
        array = jax.device_put(read(None))
    else:
        chosen = sharding if isinstance(sharding, jax.sharding.Sharding) else sharding(name, shape)
        try:
            chosen.shard_shape(shape)
        except ValueError as error:
            raise ValueError(f"parameter {name} of shape {shape} cannot be laid out as {chosen}: {error}") from error
        array = jax.make_array_from_callback(shape, chosen, read)
    return array.block_until_ready()  # or buffers of several parameters wait on the host at once


def save(
    model: Model,
    params: Params,
    path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes a folder that `load` and transformers read: safetensors, config.json and the tokenizer's files.

    One tensor at a time passes through the host. The folder appears when it is complete: it is written beside and
    renamed. A model that was not loaded is written as the first decoder family that can express its config.

    Args:
      model: the model, for its config, tokenizer and origin; its own parameters are not looked at.
      params: the parameters to write, with adapters merged.
      path: the folder. It may exist if it is empty or holds nothing but a checkpoint, which is replaced.
      dtype: floating type to round to; None keeps each parameter's own.
      max_shard_bytes: size above which the weights are split over several files; a larger tensor gets its own.

    Raises:
      ValueError: the folder holds other files; the parameters are not those of the model; no family can express the
        config; a parameter lies on devices of other processes.
    """
    path = Path(path).expanduser().resolve()
    _refuse_foreign(path)
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    family, config = _written_config(model)
    stored, flat = family.stored(model.config), flatten_dict(params, sep=".")
    expected = parameter_shapes(model)
    _check_parameters(flat, expected)
    shapes, parts = stored_shapes(stored, expected), _tensor_parts(stored)
    types = {name: np.dtype(dtype or flat[parts[name][0][0]].dtype) for name in shapes}
    if wrong := {str(kind) for kind in types.values()} - {str(kind) for kind in TYPES.values()}:
        raise ValueError(f"a checkpoint holds floating numbers, got the type {', '.join(sorted(wrong))}; give dtype")
    config["dtype"] = str(types[max(shapes, key=lambda name: np.prod(shapes[name]))])  # of the largest tensor
    config.pop("torch_dtype", None)  # its older name

    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        _write_weights(temporary, shapes, types, max_shard_bytes, lambda name: _tensor(parts[name], flat, types[name]))
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if model.tokenizer is not None:
            _write_tokenizer(model.tokenizer, temporary)
        _replace(path, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, expected the folder to write a checkpoint to")
    own = ("config.json", *SIDE_FILES, *WEIGHT_FILES)
    names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    foreign = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in own)]
    if foreign or (names and "config.json" not in names):
        raise ValueError(
            f"{path} holds {', '.join((foreign or names)[:5])}, so it is not just a checkpoint to be replaced; "
            "give an empty or a new folder"
        )


def _written_config(model: Model) -> tuple[Family, dict[str, Any]]:
    """The family to write, and a config.json that gives back the model's config, but for how it is computed."""
    own = model.config
    if isinstance(own, DecoderConfig):
        own = dataclasses.replace(own, remat="none", scan_layers=False)
    if model.family is None:
        for family in families.FAMILIES.values():
            if family.config_to is not None and (config := _expressed(family, own, {})) is not None:
                return family, config
        raise ValueError(f"no decoder family of Hugging Face has {own}; use save_params, or set model.family")
    family = FAMILIES[model.family]
    source = model.source or {}
    if source and family.config_from(source) == own:
        return family, {**source, "architectures": [model.family]}
    if (config := _expressed(family, own, source)) is None:
        raise ValueError(f"{model.family} cannot express {own}; keep the config that the model came with")
    return family, config


def _expressed(family: Family, config: Any, source: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config.json that the family reads as `config`, on top of the keys of `source`; None if there is none."""
    try:
        written = {**source, **family.config_to(config)} if family.config_to else {}
        return written if family.config_from(written) == config else None
    except (ValueError, KeyError):
        return None


def _check_parameters(flat: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [f"{name} is missing" for name in sorted(set(expected) - set(flat))]
    wrong += [f"{name} is not the model's" for name in sorted(set(flat) - set(expected))]
    for name in sorted(set(flat) & set(expected)):
        leaf = flat[name]
        if leaf.shape != expected[name]:
            wrong.append(f"{name} is {list(leaf.shape)}, expected {list(expected[name])}")
        elif isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            wrong.append(f"{name} lies on devices of other processes (gather it first)")
    if wrong:
        rest = f", and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(
            f"these parameters cannot be saved as the model's: {', '.join(wrong[:10])}{rest}; merge adapters first"
        )


Part = tuple[str, tuple[Any, ...], Stored]  # parameter, the layer and expert of it, where it lies


def _tensor_parts(stored: Mapping[str, Stored]) -> dict[str, list[Part]]:
    """The parameters, or layers and experts of them, that make up each tensor, in the order of their rows."""
    parts: dict[str, list[Part]] = {}
    for name, place in stored.items():
        for number, tensor in enumerate(place.names):
            parts.setdefault(tensor, []).append((name, np.unravel_index(number, place.stack), place))
    for of_tensor in parts.values():
        of_tensor.sort(key=lambda part: part[2].rows or (0, 0))
    return parts


def _tensor(parts: Sequence[Part], flat: Mapping[str, Any], dtype: np.dtype) -> np.ndarray:
    """A tensor as the checkpoint stores it."""
    pieces = []
    for name, index, place in parts:
        array = _to_host(flat[name][index] if index else flat[name], dtype)
        pieces.append(array.T if place.transpose else array)
    return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]


def _to_host(leaf: Any, dtype: np.dtype) -> np.ndarray:
    """A parameter as a NumPy array.

    A jax array keeps what it has once given to the host, which would add up to the whole model: so a copy of it is
    asked. An array on one CPU device gives a view, which costs nothing.
    """
    if isinstance(leaf, jax.Array) and [device.platform for device in leaf.devices()] != ["cpu"]:
        leaf = jnp.array(leaf, dtype)
    return np.asarray(leaf).astype(dtype, copy=False)


def _write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, np.dtype],
    max_shard_bytes: float,
    read: Callable[[str], np.ndarray],
) -> None:
    sizes = {name: types[name].itemsize * int(np.prod(shape)) for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    several = len(shards) > 1
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if several else WEIGHTS
        names = sorted(names, key=lambda name: -types[name].itemsize)  # so that each starts at a multiple of its size
        write_file(folder / file, [(name, types[name], shapes[name]) for name in names], read)
        places.update(dict.fromkeys(names, file))
    if several:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copies the files that the tokenizer was read from; the first of them is the tokenizer itself."""
    files = [Path(file) for file in tokenizer.files]
    for file in files:
        if file.is_file():
            name = f"tokenizer{file.suffix}" if file == files[0] and file.name not in TOKENIZER_FILES else file.name
            shutil.copyfile(file, folder / name)
    if not files or not files[0].is_file():
        if isinstance(tokenizer.backend, tokenizers.Tokenizer):
            tokenizer.backend.save(str(folder / "tokenizer.json"))
            config = {**tokenizer.names, "chat_template": tokenizer.chat_template}
            (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        else:
            warnings.warn(f"saved without the tokenizer: {files[:1]} is not there any more", stacklevel=3)


def _replace(path: Path, new: Path) -> None:
    """Puts the folder `new` at `path`; what was there goes once that is done."""
    if not path.exists():
        new.rename(path)
        return
    old = path.with_name(new.name + ".old")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)
