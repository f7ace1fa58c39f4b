"""The geography world's tokenizer. `jaxrl_llm.data.worlds.train_tokenizer` made its file and says what is in it."""

from __future__ import annotations

from functools import cache
from importlib import resources

from jaxrl_llm.models.tokenizer import Tokenizer, load_tokenizer


@cache
def geography_tokenizer() -> Tokenizer:
    """The tokenizer that comes with the package: 8192 tokens, ten of them special (`<pad>` is 0, `<eos>`, and the
    opening and closing tags `think`, `search`, `information`, `answer`)."""
    with resources.as_file(resources.files("jaxrl_llm.data") / "geography" / "tokenizer.json") as path:
        return load_tokenizer(path)
