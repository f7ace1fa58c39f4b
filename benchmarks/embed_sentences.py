"""Time to embed sentences with an encoder in the format of sentence-transformers, and with PyTorch on the same weights.

    python -m benchmarks.embed_sentences MODEL_FOLDER TEXT_FILE --sentences 200 --torch

Tokenization is part of the time on both sides. PyTorch gets batches as sentence-transformers makes them: sorted by
length and padded to the longest text. Times are medians over repeats after a warm-up, which for ours includes
compilation (printed); with `--torch` the two sides take turns, and the smallest cosine between their vectors is
printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxrl_llm.models.sentence import Embedder, load_embedder


def read_sentences(path: Path, number: int) -> list[str]:
    """The first sentences of at least five words in a text that is tokenized by spaces; headings are left out."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    sentences = [s for line in lines if not line.startswith("=") for s in line.split(" . ") if len(s.split()) >= 5]
    if len(sentences) < number:
        raise ValueError(f"{path} has {len(sentences)} sentences, {number} were asked for; give a longer text")
    return sentences[:number]


def torch_embed(embedder: Embedder, folder: Path, batch_size: int) -> Callable[[Sequence[str]], np.ndarray]:
    """The same with PyTorch: mean of the states over real tokens, scaled to length 1."""
    import torch
    import transformers

    if embedder.settings.pooling != "mean" or not embedder.settings.normalize:
        raise ValueError(f"PyTorch gets normalized means here, the model has {embedder.settings}; leave --torch out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def embed(texts: Sequence[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = np.empty((len(texts), model.config.hidden_size), np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = tokenizer(
                    [texts[i] for i in chosen], padding=True, truncation=True,
                    max_length=embedder.settings.max_length, return_tensors="pt",
                )  # fmt: skip
                weights = batch["attention_mask"][..., None].float()
                pooled = (model(**batch).last_hidden_state * weights).sum(1) / weights.sum(1)
                vectors[chosen] = torch.nn.functional.normalize(pooled).numpy()
        return vectors

    return embed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("text", type=Path, help="file with text")
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32, help="texts in a batch of PyTorch's")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--torch", action="store_true", help="time PyTorch too, and compare the vectors")
    parser.add_argument("--json", action="store_true", help="print one JSON line and nothing else")
    args = parser.parse_args()

    sentences = read_sentences(args.text, args.sentences)
    embedder = load_embedder(args.model)
    sides: dict[str, Callable[[Sequence[str]], np.ndarray]] = {"ours": embedder.embed}
    if args.torch:
        sides["torch"] = torch_embed(embedder, args.model / embedder.settings.model_folder, args.batch_size)
    result: dict[str, float] = {
        "sentences": len(sentences),
        "tokens": sum(len(encoding.ids) for encoding in embedder.tokenizer.encode_batch(sentences)),
    }
    vectors: dict[str, np.ndarray] = {}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name, embed in sides.items():
        start = time.perf_counter()
        vectors[name] = embed(sentences)
        result[f"{name}_first_seconds"] = time.perf_counter() - start
    for _ in range(args.repeats):
        for name, embed in sides.items():
            start = time.perf_counter()
            embed(sentences)
            times[name].append(time.perf_counter() - start)
    for name in sides:
        result[f"{name}_seconds"] = statistics.median(times[name])
        result[f"{name}_tokens_per_second"] = result["tokens"] / result[f"{name}_seconds"]
    if args.torch:
        result["ours_over_torch"] = result["ours_seconds"] / result["torch_seconds"]
        result["smallest_cosine"] = float((vectors["ours"] * vectors["torch"]).sum(1).min())
    if args.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key.replace('_', ' '):24} {value:.7g}")


if __name__ == "__main__":
    main()
