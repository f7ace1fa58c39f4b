"""The geography world's tokenizer: byte-pair encoding over Unicode characters, trained on the world's own text.

    python -m jaxrl_llm.data.worlds.train_tokenizer [path]      writes tokenizer.json again, the same file every time

Words are split at spaces and at punctuation, and a token never spans two words. A space belongs to the word behind it
(`▁Kenya`), and one is put in front of text that starts without: so a name has the same tokens everywhere but directly
behind punctuation. Characters outside the training text fall back to their bytes, so that every text encodes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from jaxrl_llm.data.worlds.geography import CORRECTION, RELATIONS_BY_HOPS, geography_passages, question_phrasings

ACTION_TAGS = ("think", "search", "information", "answer")
SPECIAL_TOKENS = ("<pad>", "<eos>", *(tag for name in ACTION_TAGS for tag in (f"<{name}>", f"</{name}>")))
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
VOCAB_SIZE = 8192


def tokenizer_text() -> Iterator[str]:
    """What the tokenizer is trained on: every passage, every name once more in a question (the phrasings in turn), and
    the environment's correction, often enough that its words become tokens."""
    titles, passages = geography_passages()
    phrasings = [
        text
        for hops, relations in RELATIONS_BY_HOPS.items()
        for relation in relations
        for text in question_phrasings(hops, relation)
    ]
    yield from passages
    yield from (phrasing.format(title) for title, phrasing in zip(titles, cycle(phrasings), strict=False))
    yield from [CORRECTION] * 100


def train_tokenizer(vocab_size: int = VOCAB_SIZE) -> tokenizers.Tokenizer:
    """Ids: special tokens, the 256 bytes, the characters of the text, then the merges in the order they were learned.

    Raises:
      ValueError: `vocab_size` does not leave room for bytes and characters.
    """
    texts = list(tokenizer_text())
    # Small letters too, where only the capital occurs: a lower-case query then encodes without bytes.
    characters = {character for text in texts for form in (text, text.lower()) for character in form}
    fixed = len(SPECIAL_TOKENS) + len(BYTE_TOKENS)
    if vocab_size <= fixed + len(characters):
        raise ValueError(
            f"vocab_size must exceed {fixed + len(characters)}, the special tokens, bytes and characters, "
            f"got {vocab_size}"
        )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - fixed, initial_alphabet=sorted(characters - {" "}), show_progress=False
        ),
    )
    # The bytes are added after training: as special tokens they would be read where a text happens to spell them.
    learned = json.loads(learner.to_str())["model"]
    pieces = [*SPECIAL_TOKENS, *BYTE_TOKENS, *sorted(learned["vocab"], key=learned["vocab"].__getitem__)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in learned["merges"]],
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def main(path: str | None = None) -> None:
    """Writes the file and prints its size and how many tokens a name takes."""
    target = Path(path) if path else Path(__file__).parents[1] / "geography" / "tokenizer.json"
    tokenizer = train_tokenizer()
    target.write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    names = [len(encoding.ids) for encoding in tokenizer.encode_batch(list(geography_passages()[0]))]
    print(f"{target}: {tokenizer.get_vocab_size()} tokens, {sum(names) / len(names):.2f} a name")


if __name__ == "__main__":
    main(*sys.argv[1:])
