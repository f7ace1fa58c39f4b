"""Tokenizers behind one small interface: a Hugging Face `tokenizer.json`, a SentencePiece `.model`, a whole checkpoint.

What a checkpoint's `tokenizer_config.json`, `special_tokens_map.json`, chat template and `generation_config.json` say
is read too, so that ids are those of `transformers.AutoTokenizer`. `jaxrl_llm.models.chat` renders conversations.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxrl_llm.models.checkpoint import optional_json
from jaxrl_llm.models.piece_model import PieceModel, read_piece_model

# Names under which tokenizer_config.json keeps single special tokens; chat templates know them as variables.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")  # the first of them that a folder has is read
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: what does the work.
      pieces: the vocabulary as written in the file, by id (`▁` or `Ġ` stands for a space). An id that no token has,
        as between the tokens of some checkpoints, reads as the empty string.
      special_ids: id of every special token by its text, e.g. `special_ids["</search>"]`.
      names: special tokens by their role, as in `names["eos_token"]`; empty where no file gives roles.
      eos_ids: the tokens that end a turn, from the tokenizer and from `generation_config.json`.
      chat_template: the Jinja text that renders a conversation, or None.
      tool_template: the one for conversations with tools, where a checkpoint has it apart.
      files: paths of what the tokenizer was read from, for a copy beside saved weights.
    """

    backend: tokenizers.Tokenizer | PieceModel
    pieces: tuple[str, ...]
    special_ids: Mapping[str, int]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    tool_template: str | None = None
    files: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. A model's matrix may have more rows, which then belong to no token."""
        return len(self.pieces)

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, if there is one."""
        return self.special_ids.get(self.names.get("bos_token", ""))

    @property
    def pad_id(self) -> int | None:
        """The token named as padding, if there is one. Masks never derive from it: a checkpoint may pad with `eos`."""
        return self.special_ids.get(self.names.get("pad_token", ""))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`. Special tokens written in the text become their single ids.

        `add_special_tokens` adds what the tokenizer's own template puts around a text, such as `[CLS]` and `[SEP]`.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """`encode` of many texts at once, in parallel where the backend can."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text`, nothing added, and for each the characters `[start, end)` of `text` that it came from.

        Tokens that share one character, as the bytes of an emoji do, start at the same place or before its end.
        """
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens written out. A space at the very start is left out where the tokenizer puts
        one before every text, as it is no part of the text that was encoded. Incomplete UTF-8 reads as U+FFFD, ids
        that no token has read as nothing.

        Raises:
          ValueError: an id is negative.
        """
        ids = [int(i) for i in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"token ids must be at least 0, got {min(ids)} at {ids.index(min(ids))}; cut padding off")
        return self.backend.decode(ids, skip_special_tokens=False)


def stop_sequences(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """Token sequences by which a sampler notices that a text of `texts` was written, alone or merged at its ends with
    what is often around it (spaces, line breaks, brackets).

    A policy can spell a text in other ways, too rare to list them all; whoever reads the turn should not rely on where
    it stopped.
    """
    found: dict[tuple[int, ...], None] = {}
    for text in texts:
        for before in ("", " ", "\n", "a", ".", ">", "}"):
            for after in ("", " ", "\n", "\n\n", ".", "<"):
                ids, spans = tokenizer.encode_with_spans(before + text + after)
                start, end = len(before), len(before) + len(text)
                found[tuple(i for i, (a, b) in zip(ids, spans, strict=True) if a < end and b > start)] = None
    return [list(ids) for ids in found if ids]


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text as its tokens arrive; the parts joined are `tokenizer.decode` of all ids.

    A part is held back while it ends within a character, so that no half of one is shown as U+FFFD. Bytes that never
    make a character come out with the next one that does, or at the end.
    """
    window: list[int] = []  # the tokens of the part shown last, as what follows may read differently without them
    shown = 0  # how many of the window's tokens those are
    for i in ids:
        window.append(int(i))
        before, text = tokenizer.decode(window[:shown]), tokenizer.decode(window)
        if not text.endswith("\ufffd") and len(text) > len(before):
            yield text[len(before) :]
            window = window[shown:]
            shown = len(window)
    if rest := tokenizer.decode(window)[len(tokenizer.decode(window[:shown])) :]:
        yield rest


def token_bytes(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """The bytes that each id adds to a text, with a piece's leading space; none for special tokens and for ids without
    a token. A token may be a part of a character.

    Raises:
      ValueError: tokens are no byte strings, as those of WordPiece, where a space depends on what stands before.
    """
    if isinstance(tokenizer.backend, PieceModel):
        kinds, added = {"Metaspace"}, {i: text for text, i in tokenizer.backend.special.items()}
    else:
        decoder = json.loads(tokenizer.backend.to_str())["decoder"] or {}
        kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
        added = {i: token.content for i, token in tokenizer.backend.get_added_tokens_decoder().items()}
    # GPT-2's alphabet: a printable byte stands for itself, the others, in order, for the characters from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}

    def read(piece: str) -> bytes:
        if "ByteLevel" in kinds:
            return bytes(byte_of[character] for character in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        raise ValueError(
            f"tokens of a {sorted(kinds)} tokenizer are no byte strings; expected byte-level or SentencePiece"
        )
    special = set(tokenizer.special_ids.values())
    return tuple(
        b"" if i in special else added[i].encode() if i in added else read(piece)
        for i, piece in enumerate(tokenizer.pieces)
    )


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a `tokenizer.json`, a SentencePiece `.model`, or a checkpoint's folder that has one of them.

    A single file says what the tokens are, and nothing of their roles beyond what a SentencePiece model knows. A
    folder's other files add tokens, roles, chat templates and further ends of a turn.

    Raises:
      ValueError: there is no such file, a file is not what its name says, or an added token cannot get its id.
    """
    place = Path(path)
    if place.is_file():
        return _read(place, {})
    if not place.is_dir():
        raise ValueError(
            f"no tokenizer file at {str(place)!r}; expected the path of a tokenizer.json, of a SentencePiece .model or "
            "of a folder that has one of them"
        )
    found = [place / name for name in FILES if (place / name).is_file()]
    if not found:
        raise ValueError(
            f"no tokenizer file in {str(place)!r}; expected one of {', '.join(FILES)}. A folder with vocab.txt or "
            "vocab.json alone gets a tokenizer.json from transformers' AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...)"
        )
    config = optional_json(place / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # older checkpoints keep the roles in a file of their own
        config = config | optional_json(place / "special_tokens_map.json")
    tokenizer = _read(found[0], config)
    templates = _chat_templates(place, config)
    ends = optional_json(place / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else []
    files = [found[0], *(place / name for name in COMPANIONS if (place / name).is_file())]
    return dataclasses.replace(
        tokenizer,
        eos_ids=tuple(dict.fromkeys([*tokenizer.eos_ids, *ends])),
        chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"),
        files=tuple(str(file) for file in files),
    )


def wrap_tokenizer(backend: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None) -> Tokenizer:
    """A `Tokenizer` around one of the `tokenizers` package, which it changes: tokens that `config`, the content of a
    `tokenizer_config.json`, names and the backend lacks are added to it, and its truncation and padding are turned off.

    Raises:
      ValueError: an added token cannot get the id that `config` gives it.
    """
    config = config or {}
    names, extra = _special_tokens(config)
    backend.no_truncation()
    backend.no_padding()
    if (processor := backend.post_processor) is not None:
        # Byte-level post-processors trim white space off the spans that they report; masks need the whole span.
        state = processor.__getstate__()
        processor.__setstate__(state.replace(b'"trim_offsets":true', b'"trim_offsets":false'))
        backend.post_processor = processor
    listed = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    for i, token in sorted(listed.items()):
        if token["content"] not in present:
            backend.add_tokens([tokenizers.AddedToken(**{key: token[key] for key in token if key != "__type"})])
            if backend.token_to_id(token["content"]) != i:
                raise ValueError(
                    f"tokenizer_config.json gives {token['content']!r} the id {i}, which tokenizer.json can only have "
                    f"as {backend.token_to_id(token['content'])}; the two files are not of one tokenizer"
                )
    present |= {token["content"] for token in listed.values()}
    roles = [token for token in dict.fromkeys([*names.values(), *extra]) if token not in present]
    backend.add_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in roles])

    vocab = backend.get_vocab(with_added_tokens=True)
    pieces = [""] * (max(vocab.values(), default=-1) + 1)
    for piece, i in vocab.items():
        pieces[i] = piece
    added = sorted(backend.get_added_tokens_decoder().items())
    special_ids = {token.content: i for i, token in added if token.special or token.content in names.values()}
    ends = [special_ids[names["eos_token"]]] if "eos_token" in names else []
    return Tokenizer(backend, tuple(pieces), special_ids, names, tuple(ends))


def _read(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of one file, with the tokens and roles of `config` (see `wrap_tokenizer`)."""
    if path.suffix != ".model":
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises this very class for whatever is wrong with a file
            raise ValueError(f"{str(path)!r} is not a tokenizer.json: {error}") from error
        tokenizer = wrap_tokenizer(backend, config)
    else:
        given, extra = _special_tokens(config)
        model, pieces, names = read_piece_model(path, config, given, extra)
        ends = (model.special[names["eos_token"]],) if "eos_token" in names else ()
        plain = [t["content"] for t in config.get("added_tokens_decoder", {}).values() if not t.get("special", True)]
        special_ids = {token: i for token, i in model.special.items() if token not in plain}
        tokenizer = Tokenizer(model, pieces, special_ids, names, ends)
    return dataclasses.replace(tokenizer, files=(str(path),))


def _special_tokens(config: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Special tokens of a `tokenizer_config.json`: those with a role, by role, and the others."""
    names = {key: _content(config[key]) for key in NAMED_TOKENS if config.get(key)}
    extra = [_content(token) for token in config.get("additional_special_tokens") or []]
    more = config.get("extra_special_tokens") or []  # a list, or a dict of roles that only this model has
    if isinstance(more, Mapping):
        names |= {key: _content(token) for key, token in more.items()}
    else:
        extra += [_content(token) for token in more]
    return names, extra


def _content(token: str | Mapping[str, Any]) -> str:
    """The text of a token, which files write bare or as a record."""
    return token if isinstance(token, str) else token["content"]


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; the usual one is `default`. Files go before what `tokenizer_config.json` holds."""
    stored = config.get("chat_template") or {}
    if isinstance(stored, str):
        stored = {"default": stored}
    elif isinstance(stored, list):
        stored = {template["name"]: template["template"] for template in stored}
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    return {**stored, **{name: file.read_text(encoding="utf-8") for name, file in files.items()}}
