"""Makes the three small tokenizers beside it: `python tests/models/golden/tokenizers/make.py` writes the same files.

- `chatml`: byte-level byte-pair encoding with the pre-tokenization, special tokens and chat format of Qwen2.5. Its
  template is written here and renders the text that Qwen2.5-Instruct's does. Ids have a gap, and two of the ends of a
  turn stand in `generation_config.json`.
- `t5`: a SentencePiece unigram model that drops outer spaces, with the roles of T5.
- `llama`: a SentencePiece byte-pair model that keeps every space and falls back to bytes, with the roles of Llama 2.

Trained on the passages of the geography world and the few lines of SAMPLES.
"""

import io
import json
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxrl_llm.data.worlds.geography import geography_passages

HERE = Path(__file__).parent
SAMPLES = [
    '<tool_call>\n{"name": "search", "arguments": {"query": "population of Kenya", "limit": 3}}\n</tool_call>',
    "<think> I should call the tool. </think>\n<response> The answer is 42. </response>",
    "She sells 9 eggs for $2 each, so she makes 9 * 2 = 18 dollars every day.\n#### 18",
    "Die Größe der Stadt, être où l'été, ¿cuántos años?, 日本の首都は東京です。 Привет, мир! مرحبا",
    "def f(x):\n    return x + 1\n\n\n    # spaces\tand tabs\r\n",
] * 20
# The way Qwen2 cuts a text into words, digits and runs of white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = """\
{%- set first = messages[0] %}
{%- set default = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}
{{- '<|im_start|>system\\n' + (first.content if first.role == 'system' else default) }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>\\n' }}
    {%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}
    {{- '</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in (messages[1:] if first.role == 'system' else messages) %}
    {%- if message.role == 'tool' %}
        {%- if not loop.previtem or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content or not message.tool_calls %}{{ '\\n' + message.content }}{% endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def make_chatml(texts: list[str]) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    plain = ["<tool_call>", "</tool_call>"]
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    value = json.loads(backend.to_str())
    vocab = value["model"]["vocab"]
    vocab[max(vocab, key=vocab.__getitem__)] += 20  # ids 799 and 805 to 818 belong to no token
    folder = HERE / "chatml"
    write_json(folder / "tokenizer.json", value)
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "unk_token": None}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **roles})
    write_json(folder / "generation_config.json", {"eos_token_id": [802, 800], "pad_token_id": 800})
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def make_piece_model(path: Path, texts: list[str], **options: object) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=600, minloglevel=2, num_threads=1, **options
    )
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(model.getvalue())


def main() -> None:
    texts = [*geography_passages()[1][:2000], *SAMPLES]
    make_chatml(texts)
    rules = HERE / "rules.tsv"  # white space to a space, and full-width A to a plain one: a small charsmap
    rules.write_text("9\t20\nA\t20\nD\t20\nFF21\t41\n")
    make_piece_model(
        HERE / "t5" / "spiece.model",
        texts,
        model_type="unigram",
        normalization_rule_tsv=str(rules),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    rules.unlink()
    write_json(HERE / "t5" / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 8})
    lines = [line for text in texts for line in text.split("\n")]
    make_piece_model(
        HERE / "llama" / "tokenizer.model",
        lines,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False, "add_bos_token": True}
    write_json(HERE / "llama" / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **roles})


if __name__ == "__main__":
    main()
