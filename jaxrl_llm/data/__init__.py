"""Data sets, worlds of generated tasks, and what text looks like inside `jit`."""

from jaxrl_llm.data.questions import read_questions
from jaxrl_llm.data.text_hashes import (
    TokenHashes,
    WordTable,
    answer_hash,
    answer_text_hash,
    known_words,
    token_hashes,
    word_hashes,
    word_table,
)
from jaxrl_llm.data.worlds.demonstrations import demonstrations
from jaxrl_llm.data.worlds.geography import Question, geography_index, load_geography, make_questions
from jaxrl_llm.data.worlds.tokenizer import geography_tokenizer

__all__ = [
    "Question",
    "TokenHashes",
    "WordTable",
    "answer_hash",
    "answer_text_hash",
    "demonstrations",
    "geography_index",
    "geography_tokenizer",
    "known_words",
    "load_geography",
    "make_questions",
    "read_questions",
    "token_hashes",
    "word_hashes",
    "word_table",
]
