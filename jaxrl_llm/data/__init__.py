"""Data sets in the column formats of TRL, and worlds of generated tasks.

From a file to arrays: `read_records`, then filters, `mix_records` or `curriculum_order`, then `tokenize_...`, then
`pack_sequences` for supervised training. `Stream` and `next_batch` give what a training loop reads, at a position that
a few integers restore.
"""

from jaxrl_llm.data.encoding import (
    Encoded,
    encode_spans,
    tokenize_demonstrations,
    tokenize_listwise,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_steps,
    tokenize_unpaired,
)
from jaxrl_llm.data.mixing import curriculum_order, deduplicate_records, filter_by_tokens, filter_records, mix_records
from jaxrl_llm.data.packing import pack_best_fit, pack_sequences
from jaxrl_llm.data.questions import read_questions
from jaxrl_llm.data.readers import iterate_records, read_records
from jaxrl_llm.data.records import KINDS, Records, lookup_passages
from jaxrl_llm.data.stream import Stream, iterate_batches, next_batch, next_indices, num_batches, state_at, stream_state
from jaxrl_llm.data.text import span_mask
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
    "Encoded",
    "KINDS",
    "Question",
    "Records",
    "Stream",
    "TokenHashes",
    "WordTable",
    "answer_hash",
    "answer_text_hash",
    "curriculum_order",
    "deduplicate_records",
    "demonstrations",
    "encode_spans",
    "filter_by_tokens",
    "filter_records",
    "geography_index",
    "geography_tokenizer",
    "iterate_batches",
    "iterate_records",
    "known_words",
    "load_geography",
    "lookup_passages",
    "make_questions",
    "mix_records",
    "next_batch",
    "next_indices",
    "num_batches",
    "pack_best_fit",
    "pack_sequences",
    "read_questions",
    "read_records",
    "span_mask",
    "state_at",
    "stream_state",
    "token_hashes",
    "tokenize_demonstrations",
    "tokenize_listwise",
    "tokenize_preferences",
    "tokenize_prompts",
    "tokenize_steps",
    "tokenize_unpaired",
    "word_hashes",
    "word_table",
]
