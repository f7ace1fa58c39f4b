"""Search by inner products of vectors: exactly in JAX, and over `faiss` (Douze et al. 2024), exactly or approximately.

Vectors of length 1, as most sentence embedders give them, make the inner product the cosine.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors.numpy import load_file, save_file

Backend = Literal["jax", "faiss_flat", "faiss_ivf", "faiss_hnsw"]
Embed = Callable[[Sequence[str]], Float[np.ndarray, "N D"]]

_FORMAT = 1
_MIN_LIST_POINTS = 39  # faiss warns below this many training vectors for each list


def exact_search(
    query: Float[Array, "*S D"],
    corpus: Float[Array, "N D"],
    k: int,
    min_score: float | Float[Array, ""] | None = None,
    *,
    max_scores: int = 2**26,
) -> tuple[Float[Array, "*S k"], Int[Array, "*S k"]]:
    """The `k` rows of `corpus` with the highest inner products: `(scores, ids)`, best first, equal scores by the lower
    id. Products are taken in float32. Safe under `jit` (with `k` static) and `vmap`.

    Args:
      min_score: rows below it are not found: their places at the end get score -inf and id -1.
      max_scores: products that are held at a time, four bytes each: as many queries are searched together as that
        allows, and one at least. Cutting `corpus` into blocks instead was 1.5 to 11 times slower on two CPU cores.

    Raises:
      ValueError: `k` is below 1 or above `N`, or the widths differ.
    """
    rows, width = corpus.shape
    if query.shape[-1] != width:
        raise ValueError(f"query must have the width of corpus, {width}, got {query.shape[-1]}")
    _check_k(k, rows)

    def search(vectors: Float[Array, "*B D"]) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"]]:
        scores = jnp.einsum("...d,nd->...n", vectors, corpus, precision="highest", preferred_element_type=jnp.float32)
        return jax.lax.top_k(scores, k)  # takes the first of equals

    flat = query.reshape(-1, width)
    together = max(1, max_scores // rows)
    scores, ids = search(flat) if len(flat) <= together else jax.lax.map(search, flat, batch_size=together)
    scores, ids = (found.reshape(*query.shape[:-1], k) for found in (scores, ids))
    if min_score is not None:
        scores = jnp.where(scores >= min_score, scores, -jnp.inf)
    return scores, jnp.where(scores > -jnp.inf, ids, -1)


_jitted_search = jax.jit(exact_search, static_argnames=("k", "max_scores"))


@dataclasses.dataclass(frozen=True, eq=False)
class DenseIndex:
    """An index of vectors, made by `DenseIndex.build` or read by `DenseIndex.load`.

    Attributes:
      ids: a name for each passage, in the order of the vectors.
      width: `D`.
      kind: which search is behind it.
      store: the vectors as a JAX array, or the `faiss` index.
      embed: texts to vectors, for queries that are texts; None if they must be vectors.
    """

    ids: tuple[str, ...]
    width: int
    kind: Backend
    store: Any
    embed: Embed | None = None

    @classmethod
    def build(
        cls,
        passages: Sequence[str] | Float[np.ndarray, "N D"] | Float[Array, "N D"],
        *,
        embed: Embed | None = None,
        embed_query: Embed | None = None,
        ids: Sequence[str] | None = None,
        kind: Backend = "jax",
        num_lists: int | None = None,
        num_probes: int | None = None,
        links: int = 32,
        build_width: int = 200,
        search_width: int = 128,
    ) -> DenseIndex:
        """An index over vectors, or over texts that `embed` turns into vectors.

        Args:
          passages: the vectors, or the texts.
          embed: `load_embedder(path).embed`, or any other function of texts.
          embed_query: the same for queries, where the model treats them otherwise, such as
            `partial(embedder.embed, prompt="query: ")`; None for `embed`.
          ids: names that differ from each other; None for "0", "1", ...
          kind: `jax` and `faiss_flat` are exact. `faiss_ivf` searches `num_probes` of `num_lists` clusters,
            `faiss_hnsw` a graph; both miss some neighbors and are for millions of vectors on the host.
          num_lists: of IVF; None for `4 * sqrt(N)`, or fewer where that leaves too few vectors to a list.
          num_probes: of IVF; None for an eighth of the lists.
          links, build_width, search_width: of HNSW: neighbors of a node, and how many candidates are kept when the
            graph is built and when it is searched (faiss calls them M, efConstruction and efSearch).

        Raises:
          ValueError: no passages, texts without `embed`, vectors that are not finite or not `[N, D]`, ids that are not
            one for each or not unique, or an option out of range.
          ImportError: `faiss` is wanted and not installed.
        """
        if kind not in get_args(Backend):
            raise ValueError(f"kind must be one of {list(get_args(Backend))}, got {kind!r}")
        if len(passages) == 0:
            raise ValueError("passages is empty; an index needs at least one")
        if isinstance(passages[0], str):
            if embed is None:
                raise ValueError("passages are texts, so embed is needed: load_embedder(path).embed, or give vectors")
            passages = embed(passages)  # type: ignore[arg-type]  # texts, as the first one says
        vectors = _as_vectors(passages, "passages")
        names = tuple(map(str, range(len(vectors)) if ids is None else ids))
        if len(names) != len(vectors) or len(set(names)) != len(names):
            raise ValueError(f"ids must be {len(vectors)} different names, one for each passage, got {len(names)}, "
                             f"{len(set(names))} of them different")  # fmt: skip
        store: Any
        if kind == "jax":
            store = jnp.asarray(vectors)
        else:
            store = _faiss_store(vectors, kind, num_lists, num_probes, links, build_width, search_width)
        return cls(names, vectors.shape[1], kind, store, embed_query or embed)

    def search(
        self,
        queries: Sequence[str] | Float[np.ndarray, "Q D"] | Float[Array, "Q D"],
        k: int = 1,
        *,
        min_score: float | None = None,
    ) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """The `k` best passages of each query: `(scores, positions)`, best first. A position counts from 0, `ids` has
        its name; -1 with score -inf where fewer are found.

        Equal scores come by the lower position; which of them are found when they do not all fit into `k` is sure for
        the kind `jax` alone. May be called from several threads.

        Raises:
          ValueError: queries that are texts for an index without `embed`, vectors of another width or not finite, or a
            `k` that does not lie in [1, N].
        """
        if isinstance(queries, str):
            raise ValueError("queries must be a sequence of texts or vectors, got one string: put it into a list")
        _check_k(k, len(self.ids))
        if len(queries) == 0:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int32)
        if isinstance(queries[0], str):
            if self.embed is None:
                raise ValueError("queries are texts, but the index has no embed; give it one, or give vectors")
            queries = self.embed(queries)  # type: ignore[arg-type]  # texts, as the first one says
        vectors = _as_vectors(queries, "queries")
        if vectors.shape[1] != self.width:
            raise ValueError(f"queries must have the width of the index, {self.width}, got {vectors.shape[1]}")
        if self.kind == "jax":
            rows = 1 << (len(vectors) - 1).bit_length()  # few shapes, so that little is compiled
            padded = np.pad(vectors, ((0, rows - len(vectors)), (0, 0)))
            scores, positions = (np.asarray(found)[: len(vectors)] for found in _jitted_search(padded, self.store, k))
        else:
            scores, positions = self.store.search(vectors, k)
            order = np.lexsort((positions, -scores))
            scores, positions = (np.take_along_axis(found, order, axis=1) for found in (scores, positions))
        found = positions >= 0
        if min_score is not None:
            found &= scores >= min_score
        return np.where(found, scores, -np.inf).astype(np.float32), np.where(found, positions, -1).astype(np.int32)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the index to a folder, which is made if it is missing. What embeds is not saved."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.kind == "jax":
            save_file({"vectors": np.asarray(self.store)}, folder / "vectors.safetensors")
        else:
            _faiss().write_index(self.store, str(folder / "vectors.faiss"))
        about = {"format": _FORMAT, "kind": self.kind, "width": self.width, "ids": self.ids}
        (folder / "index.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, embed: Embed | None = None) -> DenseIndex:
        """Reads what `save` wrote. `embed` is for queries that are texts, and must be that of the passages.

        Raises:
          ValueError: the folder lacks a file or holds something else; the message names it.
          ImportError: the index is one of `faiss` and that is not installed.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            if about["format"] != _FORMAT or about["kind"] not in get_args(Backend):
                raise ValueError(f"format {about['format']!r}, kind {about['kind']!r}")
            names, width, kind = tuple(about["ids"]), about["width"], about["kind"]
            store: Any
            if kind == "jax":
                store = jnp.asarray(load_file(folder / "vectors.safetensors")["vectors"])
                shape = store.shape
            else:
                store = _faiss().read_index(str(folder / "vectors.faiss"))
                shape = (store.ntotal, store.d)
        except ImportError:
            raise
        except Exception as error:  # faiss and safetensors have errors of their own for a broken file
            raise ValueError(f"{folder} is no saved DenseIndex of format {_FORMAT}: {error!r}") from error
        if shape != (len(names), width):
            raise ValueError(f"{folder}: the vectors are {shape}, index.json says {(len(names), width)}")
        return cls(names, width, kind, store, embed)


def _as_vectors(values: Any, name: str) -> Float[np.ndarray, "N D"]:
    vectors = np.ascontiguousarray(values, np.float32)
    if vectors.ndim != 2:
        raise ValueError(f"{name} must be vectors [N, D], got shape {vectors.shape}")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise ValueError(f"{name} must be finite; row {bad[0]} is not, and {len(bad)} rows in all")
    return vectors


def _check_k(k: int, count: int) -> None:
    if not 1 <= k <= count:
        raise ValueError(f"k must lie in [1, {count}], the number of passages, got {k}")


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("this kind of index needs faiss: pip install faiss-cpu, or take kind='jax'") from error
    return faiss


def _faiss_store(
    vectors: Float[np.ndarray, "N D"],
    kind: Backend,
    num_lists: int | None,
    num_probes: int | None,
    links: int,
    build_width: int,
    search_width: int,
) -> Any:
    faiss = _faiss()
    count, width = vectors.shape
    if kind == "faiss_ivf":
        lists = max(1, min(int(4 * count**0.5), count // _MIN_LIST_POINTS)) if num_lists is None else num_lists
        probes = -(-lists // 8) if num_probes is None else num_probes
        if not 1 <= lists <= count or not 1 <= probes <= lists:
            raise ValueError(f"expected 1 <= num_probes <= num_lists <= {count}, the number of passages, got "
                             f"num_probes {probes} and num_lists {lists}")  # fmt: skip
        store = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        store.nprobe = probes
        store.train(vectors)
    elif kind == "faiss_hnsw":
        if links < 2 or build_width < 1 or search_width < 1:
            raise ValueError("expected links >= 2, build_width >= 1 and search_width >= 1, got "
                             f"{links}, {build_width} and {search_width}")  # fmt: skip
        store = faiss.IndexHNSWFlat(width, links, faiss.METRIC_INNER_PRODUCT)
        store.hnsw.efConstruction = build_width
        store.hnsw.efSearch = search_width
    else:
        store = faiss.IndexFlatIP(width)
    store.add(vectors)
    return store
