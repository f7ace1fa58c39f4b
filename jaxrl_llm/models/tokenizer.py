"""A tokenizer read from a Hugging Face `tokenizer.json`, through the light `tokenizers` package."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence

import tokenizers


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: the `tokenizers.Tokenizer` that does the work.
      pieces: the vocabulary as written in the file, by id (`▁` stands for a space).
      special_ids: id of every special token by its text, e.g. `special_ids["</search>"]`.
    """

    backend: tokenizers.Tokenizer
    pieces: tuple[str, ...]
    special_ids: Mapping[str, int]

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added. Special tokens written in the text become their single ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, in parallel."""
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens written out. A space at the very start is left out, as it is no part of the
        text that was encoded."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a `tokenizer.json`.

    Raises:
      ValueError: there is no such file, or the ids of the vocabulary leave gaps.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"no tokenizer file at {path!r}; expected the path of a tokenizer.json")
    return wrap_tokenizer(tokenizers.Tokenizer.from_file(path))


def wrap_tokenizer(backend: tokenizers.Tokenizer) -> Tokenizer:
    """A `Tokenizer` around one of the `tokenizers` package."""
    vocab = backend.get_vocab(with_added_tokens=True)
    pieces = sorted(vocab, key=vocab.__getitem__)
    if [vocab[piece] for piece in pieces] != list(range(len(pieces))):
        raise ValueError(
            f"token ids must run from 0 to {len(pieces) - 1} without gaps, got a largest id of "
            f"{max(vocab.values())} for {len(pieces)} tokens; retrain or reindex the tokenizer"
        )
    added = backend.get_added_tokens_decoder()
    return Tokenizer(backend, tuple(pieces), {token.content: i for i, token in sorted(added.items()) if token.special})
