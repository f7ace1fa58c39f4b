"""SentencePiece `.model` files behind those methods of `tokenizers.Tokenizer` that our `Tokenizer` calls.

The ids are those of the `sentencepiece` package itself, which models were trained with; `transformers` differs from it
where a text for Llama begins with a space, as it puts none in front of that one. The package knows nothing of special
tokens within a text, which chat templates write: the text is cut at them, and each part encoded.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_CONTROL = 3  # sentencepiece_model.proto: ModelProto.SentencePiece.Type


class Encoding(NamedTuple):
    """Token ids of a text, and for each the characters `[start, end)` that it came from."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class PieceModel:
    """A SentencePiece model with special tokens.

    Attributes:
      first: the `sentencepiece` processor for the beginning of a text, which puts a space before it if the model does.
      inner: one that neither puts a space there nor takes spaces away.
      special: id of every special or added token by its text.
      spaced: whether what follows a special token is encoded like a beginning.
      prefix, suffix: ids around a text that is encoded with `add_special_tokens`.
    """

    first: Any
    inner: Any
    special: Mapping[str, int]
    spaced: bool
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self.special), key=len, reverse=True)
        return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")  # (?!) never matches

    @functools.cached_property
    def _texts(self) -> dict[int, str]:
        return {i: text for text, i in self.special.items()}

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoding:
        """Ids and spans of `text`."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for part in self._pattern.split(text):
            if part in self.special:
                ids.append(self.special[part])
                offsets.append((start, start + len(part)))
            elif part:
                processor = self.inner if start and not self.spaced else self.first
                encoding = processor.encode(part, return_type="offset_mapping")
                ids += encoding["ids"]
                offsets += [(start + begin, start + end) for begin, end in encoding["offsets"]]
            start += len(part)
        if add_special_tokens:
            ids = [*self.prefix, *ids, *self.suffix]
            offsets = [(0, 0)] * len(self.prefix) + offsets + [(len(text), len(text))] * len(self.suffix)
        return Encoding(ids, offsets)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[Encoding]:
        """`encode` of each text."""
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`; ids beyond the vocabulary have none."""
        size = self.first.get_piece_size()
        parts: list[str] = []
        for is_special, run in itertools.groupby(ids, self._texts.__contains__):
            if is_special:
                parts += [] if skip_special_tokens else [self._texts[i] for i in run]
            else:
                processor = self.inner if parts else self.first
                parts.append(processor.decode([i for i in run if i < size]))
        return "".join(parts)


def read_piece_model(
    path: Path, config: Mapping[str, Any], names: Mapping[str, str], extra: Iterable[str]
) -> tuple[PieceModel, tuple[str, ...], dict[str, str]]:
    """Reads a SentencePiece model.

    Args:
      path: the `.model` file.
      config: content of the `tokenizer_config.json` beside it, or empty.
      names: special tokens by role, as `config` gives them.
      extra: further special tokens.

    Returns:
      The model, its pieces by id, and the special tokens by role, those that only the model knows included.

    Raises:
      ValueError: the file is no SentencePiece model.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes the class at run time
    try:
        proto.ParseFromString(path.read_bytes())
        first = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception as error:  # protobuf and sentencepiece each raise their own classes for a broken file
        raise ValueError(
            f"{str(path)!r} is not a SentencePiece model: {error}; where it is a tiktoken file, take the "
            "checkpoint that transformers loads, which has a tokenizer.json"
        ) from error
    pieces = [piece.piece for piece in proto.pieces]
    trainer = proto.trainer_spec
    roles = (
        ("bos_token", trainer.bos_id, trainer.bos_piece),
        ("eos_token", trainer.eos_id, trainer.eos_piece),
        ("unk_token", trainer.unk_id, trainer.unk_piece),
        ("pad_token", trainer.pad_id, trainer.pad_piece),
    )
    names = {role: piece for role, i, piece in roles if i >= 0} | dict(names)

    is_t5 = str(config.get("tokenizer_class", "")).startswith("T5")
    special = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == _CONTROL}
    special |= {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
    # Sentinels of T5 lie behind the model's pieces, the first of them last.
    sentinels = [f"<extra_id_{n}>" for n in reversed(range(int(config.get("extra_ids", 100))))] if is_t5 else []
    for token in dict.fromkeys([*names.values(), *sentinels, *extra]):
        if token not in special:
            special[token] = pieces.index(token) if token in pieces else max([len(pieces) - 1, *special.values()]) + 1
    pieces += [""] * (max([len(pieces) - 1, *special.values()]) + 1 - len(pieces))
    for token, i in special.items():
        pieces[i] = token

    # A model that drops outer spaces would lose the one behind a special token, so there each part gets its own in
    # front; so it was in early Llama checkpoints ("legacy"). Elsewhere only the text as a whole does.
    normalizer = proto.normalizer_spec
    spaced = normalizer.remove_extra_whitespaces or config.get("legacy") is True
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    inner = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    prefix = (special[names["bos_token"]],) if config.get("add_bos_token") else ()
    suffix = (special[names["eos_token"]],) if config.get("add_eos_token", is_t5) else ()
    return PieceModel(first, inner, special, spaced, prefix, suffix), tuple(pieces), names
