"""What is kept of records, in which proportions they are mixed, and in which order they come."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from jaxrl_llm.data.columns import Row
from jaxrl_llm.data.records import Records
from jaxrl_llm.data.stream import permutation
from jaxrl_llm.models.tokenizer import Tokenizer


def filter_records(records: Records, keep: Callable[[Row], bool], reason: str = "filtered") -> Records:
    """The records that `keep` holds true of; the others are counted in `skipped` under `reason`."""
    return records.select([index for index, row in enumerate(records) if keep(row)], reason)


def filter_by_tokens(
    records: Records, tokenizer: Tokenizer, *columns: str, min_tokens: int = 0, max_tokens: int | None = None
) -> Records:
    """The records whose texts in `columns` have together from `min_tokens` to `max_tokens` tokens; others are counted.

    Of messages, the contents count, without what a chat template adds.

    Raises:
      ValueError: no column is named, or one that a record does not have.
    """
    if not columns:
        raise ValueError("name the columns whose tokens count, e.g. 'prompt', 'completion'")
    counts = np.zeros(len(records), int)
    for column in columns:
        texts = [_texts_of(row, column) for row in records]
        encoded = iter(tokenizer.encode_batch([text for row_texts in texts for text in row_texts]))
        counts += [sum(len(next(encoded)) for _ in row_texts) for row_texts in texts]
    longest = np.inf if max_tokens is None else max_tokens
    kept = np.flatnonzero((counts >= min_tokens) & (counts <= longest))
    return records.select(kept.tolist(), f"not {min_tokens} to {longest} tokens")


def deduplicate_records(records: Records, *columns: str) -> Records:
    """The first of all records whose texts in `columns` are equal but for case, white space and the forms that Unicode
    holds equal (NFKC); others are counted.

    Raises:
      ValueError: no column is named, or one that a record does not have.
    """
    if not columns:
        raise ValueError("name the columns that make two records the same, e.g. 'prompt'")
    first: dict[tuple[tuple[str, ...], ...], int] = {}
    for index, row in enumerate(records):
        key = tuple(tuple(map(normalize_text, _texts_of(row, column))) for column in columns)
        first.setdefault(key, index)
    return records.select(first.values(), "duplicate")


def normalize_text(text: str) -> str:
    """A text without the differences of case, white space and Unicode's compatible forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _texts_of(row: Row, column: str) -> list[str]:
    if column not in row:
        raise ValueError(f"there is no column {column!r} in a record; its columns are {sorted(row)}")

    def texts(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value]
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            return [value["content"]]
        if isinstance(value, list):
            return [text for item in value for text in texts(item)]
        raise ValueError(f"column {column!r} must hold texts or messages, got {value!r:.80}")

    return texts(row[column])


def mix_records(
    sources: Mapping[str, Records],
    weights: Mapping[str, float],
    *,
    seed: int,
    stop: Literal["first", "all"] = "first",
) -> Records:
    """Records of several data sets in fixed proportions, each with the name of its source in the column `dataset`.

    Sources are interleaved evenly, not by lot: item k of a source with share w has its place at (k + 0.5) / w, so any
    beginning of the mixture has the proportions of the whole, within one record for two sources. Each source comes in
    an order of its own, a new one whenever it begins again.

    Args:
      weights: relative weight of each source.
      stop: at the end of the `first` source to be used up, nothing being repeated; or when `all` have been used up
        once, smaller ones being repeated.

    Raises:
      ValueError: no sources, one that is empty, other names in `weights`, a weight that is not positive, or sources of
        different kinds.
    """
    if not sources or sources.keys() != weights.keys():
        raise ValueError(f"weights must be of the sources {sorted(sources)}, got {sorted(weights)}")
    if stop not in ("first", "all"):
        raise ValueError(f"stop must be 'first' or 'all', got {stop!r}")
    names = sorted(sources)  # the mixture must not hang on the order of a dict
    if len(kinds := {records.kind for records in sources.values()}) > 1:
        raise ValueError(f"sources must be of one kind, got {', '.join(sorted(kinds))}")
    for name in names:
        if not len(sources[name]) or not 0 < weights[name] < np.inf:
            raise ValueError(
                f"source {name!r} has {len(sources[name])} records and weight {weights[name]}; both must be positive"
            )
    share = np.array([weights[name] for name in names]) / sum(weights.values())
    sizes = np.array([len(sources[name]) for name in names])
    horizon = (np.min if stop == "first" else np.max)(sizes / share)
    # Exactly `sizes` where a source sets the horizon, whatever the rounding.
    counts = np.maximum(np.round(horizon * share).astype(int), sizes if stop == "all" else 0)
    places = np.concatenate([(np.arange(count) + 0.5) / w for count, w in zip(counts, share, strict=True)])
    by_place = np.argsort(places, kind="stable")
    origins = np.repeat(np.arange(len(names)), counts)[by_place]
    numbers = np.concatenate([np.arange(count) for count in counts])[by_place]
    epochs, offsets = np.divmod(numbers, sizes[origins])
    orders = {
        (origin, epoch): permutation(int(sizes[origin]), seed, epoch, origin)
        for origin, epoch in set(zip(origins.tolist(), epochs.tolist(), strict=True))
    }
    mixed = []
    for origin, epoch, offset in zip(origins.tolist(), epochs.tolist(), offsets.tolist(), strict=True):
        row = sources[names[origin]][int(orders[origin, epoch][offset])]
        mixed.append({**row, "dataset": names[origin]})
    return Records(kinds.pop(), mixed, _sum_counts(sources))


def _sum_counts(sources: Mapping[str, Records]) -> dict[str, int]:
    return {f"{name}: {reason}": count for name, rec in sources.items() for reason, count in rec.skipped.items()}


def curriculum_order(
    difficulty: Float[np.ndarray, "N"], *, seed: int = 0, noise: float = 0.0, stages: int | None = None
) -> Int[np.ndarray, "N"]:
    """Indices of records from easy to hard, for `records.select` and a `Stream` with `shuffle=False`.

    Args:
      difficulty: larger is harder, e.g. one minus a pass rate, or a length. Equal ones keep their order.
      seed: of the noise and of the order within stages.
      noise: standard deviation of a normal error of each rank, in parts of N; 0 sorts strictly, 1 is near to shuffling.
      stages: cut into that many parts of equal size, from easy to hard, and shuffle within each.

    Raises:
      ValueError: a difficulty that is not finite, noise below 0, or fewer than one or more than N stages.
    """
    difficulty = np.asarray(difficulty, float)
    if difficulty.ndim != 1 or not np.isfinite(difficulty).all():
        raise ValueError(
            f"difficulty must be a list of finite numbers, got shape {difficulty.shape}: {difficulty!r:.80}"
        )
    if not noise >= 0:
        raise ValueError(f"noise must be 0 or more, got {noise}")
    size = len(difficulty)
    if stages is not None and not 1 <= stages <= size:
        raise ValueError(f"stages must be from 1 to the {size} records, got {stages}")
    order = np.argsort(difficulty, kind="stable")
    if noise:
        ranks = np.arange(size) + noise * size * np.random.default_rng(seed).normal(size=size)
        order = order[np.argsort(ranks, kind="stable")]
    if stages is not None:
        parts = np.array_split(order, stages)
        order = np.concatenate([part[permutation(len(part), seed, stage)] for stage, part in enumerate(parts)])
    return order
