"""Checkpoints as Hugging Face writes them: safetensors files, and where in them a parameter lies.

The format (https://github.com/huggingface/safetensors) is a length of 8 bytes, a header in JSON and the tensors' raw
bytes. It is read and written here directly, so that a device's piece of a parameter is all that is read, in any stored
type (NumPy has no bfloat16 of its own), and a model is written tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
ROWS = 256  # of a matrix, copied at once
# Tensors that a checkpoint of any family may hold and no parameter needs: buffers that follow from the config, and the
# output matrix of a model whose config ties it to the embeddings.
IGNORED = (r"(.*\.)?rotary_emb\.inv_freq", r"(.*\.)?position_ids", r"lm_head\.weight")


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a parameter lies in a checkpoint.

    Attributes:
      names: one tensor; several are stacked on a new first axis (experts).
      layers: if not 0, the first axis are so many layers (`scan_layers`), and `names` are those of each in turn.
      transpose: the tensor is [out, in], as torch keeps linear weights, and the parameter [in, out].
      rows: the parameter is rows [start, end) of the first axis of the stored tensor (a fused query-key-value matrix).
        All parameters of such a tensor together cover it.
    """

    names: tuple[str, ...]
    transpose: bool = False
    rows: tuple[int, int] | None = None
    layers: int = 0

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the axes of the parameter that its tensors lack."""
        experts = len(self.names) // max(self.layers, 1)
        return (self.layers,) * (self.layers > 0) + (experts,) * (experts > 1)


class Family(NamedTuple):
    """An architecture of Hugging Face in our terms.

    Attributes:
      config_from: our config from a parsed config.json; ValueError names what is not supported.
      stored: where each parameter lies, by its dotted name (`layers.0.attention.query.kernel`).
      make_model: the model of a config, a frozen dataclass with `config`, `init(key) -> params` and the fields
        `params`, `tokenizer`, `family` and `source`, which loading fills in.
      config_to: a config.json for our config, `architectures` and `model_type` included; None if the family can be
        loaded but not written from scratch.
      ignored: regular expressions (whole names) of tensors a checkpoint may hold that no parameter needs.
      renamed: (pattern, replacement) of `re.sub`, which make a checkpoint's tensor names those of `stored`, for
        checkpoints with another prefix or with old names.
    """

    config_from: Callable[[dict[str, Any]], Any]
    stored: Callable[[Any], Mapping[str, Stored]]
    make_model: Callable[[Any], Any]
    config_to: Callable[[Any], dict[str, Any]] | None = None
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()


class Tensor(NamedTuple):
    """A tensor of a safetensors file: its type (`F32`), its shape, and the byte of the file at which it starts."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class Differences(NamedTuple):
    """What keeps a checkpoint from being loaded, one line of text per tensor. All empty when it fits."""

    missing: list[str]
    surplus: list[str]
    misshapen: list[str]
    unreadable: list[str]

    def describe(self, limit: int = 10) -> str:
        """One text of all of them, at most `limit` of a kind written out."""
        parts = []
        for kind, lines in self._asdict().items():
            if lines:
                rest = f", and {len(lines) - limit} more" if len(lines) > limit else ""
                parts.append(f"{len(lines)} {kind}: {', '.join(lines[:limit])}{rest}")
        return "; ".join(parts)


def parse_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: the file is not JSON, or something else than an object; the message names it.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text's encoding, or of the JSON
        raise ValueError(f"{path} is not JSON ({error}); was it downloaded whole?") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} holds a JSON {type(parsed).__name__}, expected an object")
    return parsed


def optional_json(path: Path) -> dict[str, Any]:
    """`parse_json`, and an empty object where there is no file."""
    return parse_json(path) if path.is_file() else {}


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, from its header alone.

    Raises:
      ValueError: the file is cut short or is not a safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} is cut short or is no safetensors file: {size} bytes, while its header alone would take "
                f"{length}; download or copy it again"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            ends = {name: int(entry["data_offsets"][1]) for name, entry in header.items()}
            tensors = {
                name: Tensor(
                    path,
                    entry["dtype"],
                    tuple(int(size) for size in entry["shape"]),
                    8 + length + int(entry["data_offsets"][0]),
                )
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} is no safetensors file: its header cannot be read ({error!r})") from error
    expected = 8 + length + max(ends.values(), default=0)
    if size < expected:
        raise ValueError(f"{path} is cut short: {size} of {expected} bytes; download or copy it again")
    for name, tensor in tensors.items():
        itemsize = TYPES[tensor.dtype].itemsize if tensor.dtype in TYPES else None
        if itemsize and 8 + length + ends[name] - tensor.start != itemsize * int(np.prod(tensor.shape)):
            raise ValueError(
                f"{path} is damaged: the bytes of {name} do not make {tensor.dtype}{list(tensor.shape)}; "
                "download it again"
            )
    return tensors


def read_headers(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, in `model.safetensors` or in the shards that its index names.

    Raises:
      ValueError: there are no weights, a shard is missing, lacks a tensor of the index, or is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        if torch_files := sorted(path.name for path in folder.glob("*.bin")):
            raise ValueError(
                f"{folder} holds PyTorch weights only ({', '.join(torch_files[:3])}); convert them: load the model "
                "with transformers and save_pretrained it, which writes safetensors"
            )
        raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
    places = parse_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files; download it again")
    shards = sorted(set(places.values()))
    if absent := [name for name in shards if Path(name).name != name or not (folder / name).is_file()]:
        raise ValueError(
            f"{folder / INDEX} names {len(absent)} of {len(shards)} shards that are not in the folder: "
            f"{', '.join(absent[:10])}; download or copy them"
        )
    headers = {name: read_header(folder / name) for name in shards}
    if lost := sorted(name for name, shard in places.items() if name not in headers[shard]):
        raise ValueError(
            f"{folder}: {len(lost)} tensors are not in the shard that {INDEX} gives, such as {lost[0]} in "
            f"{places[lost[0]]}; are the shards of another checkpoint?"
        )
    return {name: headers[shard][name] for name, shard in places.items()}


def rename(tensors: Mapping[str, Tensor], renamed: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors under the names that `Family.stored` uses."""
    result = dict(tensors)
    for pattern, replacement in renamed:
        result = {re.sub(pattern, replacement, name): tensor for name, tensor in result.items()}
    if len(result) < len(tensors):
        raise ValueError(f"{len(tensors) - len(result)} tensors of the checkpoint have the same name after renaming")
    return result


def stored_shapes(stored: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint whose parameters have these `shapes`."""
    if odd := sorted(set(stored) ^ set(shapes)):
        raise ValueError(f"the family's map of names and its model disagree on {len(odd)} parameters: {odd[:10]}")
    result: dict[str, tuple[int, ...]] = {}
    for name, place in stored.items():
        shape = shapes[name][len(place.stack) :]
        shape = shape[::-1] if place.transpose else shape
        for tensor in place.names:
            if place.rows is not None:
                shape = (max(place.rows[1], result.get(tensor, (0,))[0]), *shape[1:])
            result[tensor] = shape
    return result


def compare(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], ignored: Iterable[str] = ()
) -> Differences:
    """What a checkpoint lacks of the `expected` tensors, or has beyond them and the `ignored` ones."""
    patterns = [re.compile(pattern) for pattern in (*IGNORED, *ignored)]
    beyond = [name for name in tensors if name not in expected]
    both = [(name, tensors[name], shape) for name, shape in expected.items() if name in tensors]
    return Differences(
        missing=sorted(name for name in expected if name not in tensors),
        surplus=sorted(name for name in beyond if not any(pattern.fullmatch(name) for pattern in patterns)),
        misshapen=sorted(
            f"{name} is {list(tensor.shape)}, expected {list(shape)}"
            for name, tensor, shape in both
            if tensor.shape != shape
        ),
        unreadable=sorted(
            f"{name} is of type {tensor.dtype}, expected one of {', '.join(TYPES)}"
            for name, tensor, _ in both
            if tensor.dtype not in TYPES
        ),
    )


def read_piece(
    place: Stored,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    index: tuple[slice, ...],
    dtype: np.dtype,
) -> np.ndarray:
    """Piece `index` of a parameter of `shape`, converted to `dtype`. Nothing else of the files is read."""
    bounds = [slice(*cut.indices(size)) for cut, size in zip(index, shape, strict=True)]
    piece = _aligned([cut.stop - cut.start for cut in bounds], dtype)
    stacked = len(place.stack)
    numbers = np.arange(len(place.names)).reshape(place.stack)[tuple(bounds[:stacked])].reshape(-1)
    targets, inner = piece.reshape(len(numbers), *piece.shape[stacked:]), bounds[stacked:]
    if place.transpose:
        targets, inner = np.swapaxes(targets, 1, 2), inner[::-1]
    if place.rows is not None:
        first = place.rows[0]
        inner = [slice(first + inner[0].start, first + inner[0].stop), *inner[1:]]
    for i, number in enumerate(numbers if piece.size else ()):
        tensor = tensors[place.names[number]]
        # mapped for one tensor at a time: the pages of a file that stays mapped would count as memory in use
        mapped = np.memmap(tensor.path, TYPES[tensor.dtype], "r", tensor.start, tensor.shape)
        _copy(mapped[tuple(inner)], targets[i, ...])
    return piece


def _aligned(shape: Sequence[int], dtype: np.dtype, alignment: int = 64) -> np.ndarray:
    """An empty array that starts where jax wants it, so that on a CPU it becomes a jax array without being copied."""
    size = dtype.itemsize * int(np.prod(shape))
    buffer = np.empty(size + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size].view(dtype).reshape(shape)


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copies and converts; in blocks of rows, as a transposed copy of a large matrix is three times faster for it."""
    if source.ndim < 2:
        target[...] = source
        return
    for row in range(0, len(source), ROWS):
        target[row : row + ROWS] = source[row : row + ROWS]


def write_file(
    path: Path, tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]], read: Callable[[str], np.ndarray]
) -> None:
    """Writes a safetensors file of the named types and shapes; `read(name)` gives a tensor when its turn comes."""
    tags = {dtype: tag for tag, dtype in TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + dtype.itemsize * int(np.prod(shape))
        header[name] = {"dtype": tags[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in tensors:
            array = read(name)
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, the header says {dtype}{list(shape)}")
            array = np.atleast_1d(array)
            for row in range(0, len(array), ROWS):  # a transposed array is copied in blocks as well, and never whole
                file.write(np.ascontiguousarray(array[row : row + ROWS]).reshape(-1).view(np.uint8).data)
