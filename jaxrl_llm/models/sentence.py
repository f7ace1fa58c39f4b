"""Sentence embeddings from a folder in the format of sentence-transformers (Reimers and Gurevych 2019)."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.checkpoint import optional_json
from jaxrl_llm.models.download import fetch
from jaxrl_llm.models.encoder import EncoderConfig, EncoderModel
from jaxrl_llm.models.hub import load
from jaxrl_llm.models.pooling import Pooling, pool_hidden
from jaxrl_llm.models.seq2seq import Seq2SeqModel
from jaxrl_llm.types import Params

_POOLING_FLAGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
_POOLING_NAMES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last", "max": "max"}
_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclasses.dataclass(frozen=True)
class SentenceSettings:
    """What a sentence-transformers folder says beside the model.

    Attributes:
      model_folder: where config.json, weights and tokenizer lie, relative to the folder.
      pooling: how states become one vector.
      normalize: whether the vectors are scaled to length 1.
      max_length: tokens of a text that are read, special tokens included; None if the folder does not say.
      lowercase: whether texts are lowercased before the tokenizer sees them.
      prompts: named texts to put in front, such as `query`.
      include_prompt: whether the tokens of a prompt are pooled with the others.
    """

    model_folder: str = ""
    pooling: Pooling = "mean"
    normalize: bool = False
    max_length: int | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    include_prompt: bool = True


def read_sentence_settings(path: str | os.PathLike[str]) -> SentenceSettings:
    """Reads modules.json and what it points to. Without a modules.json: mean pooling, not normalized.

    Raises:
      ValueError: a module or a way of pooling that is not supported; the message names it.
    """
    folder = Path(path)
    modules_file = folder / "modules.json"
    if not modules_file.is_file():
        return SentenceSettings()
    try:
        modules = [(module["type"], module.get("path", "")) for module in json.loads(modules_file.read_text("utf-8"))]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{modules_file} is no list of modules with a type each ({error!r})") from error
    settings = optional_json(folder / "config_sentence_transformers.json")
    found: dict[str, Any] = {"prompts": settings.get("prompts") or {}}
    for full_type, place in modules:
        kind = full_type.rsplit(".", 1)[-1]
        if kind == "Transformer":
            transformer = optional_json(folder / place / "sentence_bert_config.json")
            found |= {
                "model_folder": place,
                "max_length": transformer.get("max_seq_length"),
                "lowercase": bool(transformer.get("do_lower_case")),
            }
        elif kind == "Pooling":
            pooling = optional_json(folder / place / "config.json")
            found |= {
                "pooling": _pooling(pooling, folder / place / "config.json"),
                "include_prompt": pooling.get("include_prompt", True),
            }
        elif kind == "Normalize":
            found["normalize"] = True
        else:
            raise ValueError(f"{modules_file}: module {full_type!r} is not supported; supported are {list(_MODULES)}")
    return SentenceSettings(**found)


def _pooling(config: Mapping[str, Any], path: Path) -> Pooling:
    modes = [config["pooling_mode"]] if "pooling_mode" in config else [
        name for name, on in config.items() if name.startswith("pooling_mode_") and on
    ]  # fmt: skip
    known = _POOLING_FLAGS | _POOLING_NAMES
    if len(modes) != 1 or modes[0] not in known:
        raise ValueError(f"{path}: expected one way of pooling out of {sorted(known)}, got {modes}")
    return known[modes[0]]


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Embedder:
    """Texts to vectors.

    Attributes:
      params: the model's parameters; put others here (`dataclasses.replace`) after training.
      settings: what the folder says; `settings.prompts` has the prompts that belong to the model.
      tokenizer: adds the special tokens and truncates.
      forward: `(params, tokens[B, T], lengths[B]) -> f32[B, D]`, jitted: compiled once for each shape.
    """

    params: Params
    settings: SentenceSettings
    tokenizer: tokenizers.Tokenizer
    forward: Callable[..., Float[Array, "B D"]]

    def embed(self, texts: Sequence[str], *, batch_tokens: int = 1024, prompt: str = "") -> Float[np.ndarray, "N D"]:
        """The vectors of `texts`, in their order. Batches are made of texts of similar length, the shorter the more of
        them, and padded to one of few shapes; a text's vector does not depend on its batch, but for rounding.

        Args:
          batch_tokens: tokens of a batch, padding included; an accelerator wants many more than a CPU.
          prompt: put in front of every text.

        Raises:
          ValueError: an entry is no string, `batch_tokens` is not positive, or the model wants prompts left out of
            pooling, which is not supported.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a sequence of strings, got one string: put it into a list")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"texts[{index}] must be a string, got {type(text).__name__}: {text!r}")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
        if prompt and not self.settings.include_prompt:
            raise ValueError("pooling without the prompt (include_prompt=false) is not supported: leave prompt out")
        written = [prompt + text for text in texts]
        if self.settings.lowercase:
            written = [text.lower() for text in written]
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(written)]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        batches, start = [], 0
        while start < len(order):
            rows = rows_that_fit(len(ids[order[start]]), batch_tokens)
            batches.append(order[start : start + rows])
            start += rows
        # all batches are under way before the first one is waited for
        pending = [self.forward(self.params, *pad_batch([ids[i] for i in batch])) for batch in batches]
        if not batches:
            return np.zeros((0, jax.eval_shape(self.forward, self.params, *pad_batch([[0]])).shape[1]), np.float32)
        vectors = [np.asarray(rows)[: len(batch)] for batch, rows in zip(batches, pending, strict=True)]
        return np.concatenate(vectors)[np.argsort(order)]


def bucket(length: int) -> int:
    """The smallest padded length that holds `length`: at least 8, four in each doubling, multiples of 4."""
    step = max(4, 2 ** max((length - 1).bit_length() - 3, 0))
    return max(8, -(-length // step) * step)


def rows_that_fit(length: int, batch_tokens: int) -> int:
    """How many texts of `length` tokens make a batch: the largest power of two within `batch_tokens`, at least 1."""
    return 1 << (max(batch_tokens // bucket(length), 1).bit_length() - 1)


def pad_batch(rows: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Token ids with zeros behind, `T` the bucket of the longest row, and the lengths of the rows. Empty rows fill `B`
    up to the next power of two."""
    lengths = np.zeros(1 << (len(rows) - 1).bit_length(), np.int32)
    lengths[: len(rows)] = [len(row) for row in rows]
    tokens = np.zeros((len(lengths), bucket(int(lengths.max()))), np.int32)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return tokens, lengths


def make_embedder(model: Any, params: Params, tokenizer: tokenizers.Tokenizer, settings: SentenceSettings) -> Embedder:
    """An `Embedder` around an encoder or a decoder. Texts are cut at `settings.max_length` or where the model's learned
    positions end; how the tokenizer itself would pad and truncate does not count.

    Raises:
      ValueError: the model is a T5.
    """
    if isinstance(model, Seq2SeqModel):
        raise ValueError("a T5 is no sentence embedder here; give an encoder or a decoder")
    if isinstance(model.config, EncoderConfig) and model.config.rope_thetas is None:
        room = model.config.num_positions - model.config.position_offset
        settings = dataclasses.replace(settings, max_length=min(settings.max_length or room, room))

    def forward(params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Float[Array, "B D"]:
        mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
        if isinstance(model, EncoderModel):
            hidden = model.apply(params, tokens, mask=mask)
        else:  # a decoder never sees the padding behind a text
            hidden, _ = model.apply(params, tokens)
        pooled = pool_hidden(hidden, mask, settings.pooling)
        if settings.normalize:
            pooled = pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        return pooled

    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    if settings.max_length is not None:
        copy.enable_truncation(settings.max_length)
    return Embedder(params, settings, copy, jax.jit(forward))


def load_embedder(path_or_hub_id: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> Embedder:
    """Reads a sentence-transformers folder or hub id, or one with an encoder or a decoder alone (then: mean pooling).

    Args:
      dtype: of the parameters and of the computation; the vectors are float32 in any case.

    Raises:
      ValueError: the folder lacks something or holds something that is not supported; the message names it.
    """
    top = fetch(os.fspath(path_or_hub_id))
    settings = read_sentence_settings(top)
    folder = top / settings.model_folder
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; load its tokenizer with transformers' AutoTokenizer and "
                         "save_pretrained it there")  # fmt: skip
    model = load(folder, dtype=dtype)
    return make_embedder(model, model.params, tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), settings)
