"""Top-K of very long histories in two steps: an index lists, exact cosines order, recall is measured."""
# N behaviours, M candidates, D dims, K kept, P listed

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import faiss as faiss_module
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from prerank_tools.gsu.cosine import inverse_norms
from prerank_tools.gsu.rank import cosines_at
from prerank_tools.gsu.search import RECENT, Groups, TopK, empty_topk, topk

Index = Literal["ivf", "hnsw", "items"]
faiss: Any = faiss_module  # its stubs lack the search parameters


class TwoStepConfig(BaseModel):
    """From which length on a history is indexed, how much is listed, how hard is looked (ours)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heavy: int = Field(default=20_000, ge=1)  # behaviours
    listed: int = Field(default=200, ge=1)  # behaviours ranked exactly, for each candidate
    lists: int = Field(default=0, ge=0)  # inverted lists; 0: four times the root of the history
    probe: int = Field(default=32, ge=1)  # inverted lists read
    breadth: int = Field(default=256, ge=1)  # HNSW: nodes kept while searching
    neighbors: int = Field(default=500, ge=1)  # item-to-item: neighbours of a candidate
    sample: int = Field(default=200, ge=1)  # candidates whose recall is measured
    seed: int = 0


class Recall(NamedTuple):
    """Of the exact top K of a sample of candidates, how many were found."""

    found: int
    wanted: int


def topk_two_step(
    table_VD: np.ndarray,
    groups: Groups,
    index: Index,
    config: TwoStepConfig,
    *,
    k: int = 50,
    recent: int = RECENT,
    threads: int = 2,
) -> tuple[TopK, Recall]:
    """`search.topk`, with the histories of `config.heavy` behaviours or more searched through an index.

    What is found is ordered by exact cosines; ties go to the later behaviour; what is missed is measured
    against the exact search on a sample. `n_valid` counts as in the exact search.
    """
    faiss.omp_set_num_threads(threads)
    heavy_G = np.diff(groups.history_offsets) >= config.heavy
    heavy_M = heavy_G[groups.of_candidates()]
    found = empty_topk(len(heavy_M), k=k, recent=recent)
    light = topk(table_VD, select(groups, ~heavy_G), k=k, recent=recent, threads=threads)
    long = select(groups, heavy_G)
    step = _listed(table_VD, long, index, config, k=k, recent=recent)
    for whole, of_light, of_heavy in zip(found, light, step, strict=True):
        whole[~heavy_M], whole[heavy_M] = of_light, of_heavy
    return found, _recall(table_VD, long, step, config, k=k, threads=threads)


def select(groups: Groups, wanted_G: np.ndarray) -> Groups:
    """Some of the groups."""
    history, asked = np.diff(groups.history_offsets), np.diff(groups.candidate_offsets)
    behaviors, candidates = np.repeat(wanted_G, history), np.repeat(wanted_G, asked)
    return Groups(
        history_rows_N=groups.history_rows_N[behaviors],
        history_offsets=np.r_[0, np.cumsum(history[wanted_G])],
        candidate_rows_M=groups.candidate_rows_M[candidates],
        candidate_offsets=np.r_[0, np.cumsum(asked[wanted_G])],
        visible_M=groups.visible_M[candidates],
    )


def _listed(
    table_VD: np.ndarray, groups: Groups, index: Index, config: TwoStepConfig, *, k: int, recent: int
) -> TopK:
    """List behaviours of each candidate by the index, keep the K of highest exact cosine."""
    inverse_V = inverse_norms(table_VD)
    listed_MP = np.full((len(groups.candidate_rows_M), max(config.listed, k)), -1, dtype=np.int32)
    n_valid_M = np.zeros(len(listed_MP), dtype=np.int32)
    for group in range(len(groups.history_offsets) - 1):
        rows_n = groups.history_rows_N[groups.history_offsets[group] : groups.history_offsets[group + 1]]
        members = np.arange(groups.candidate_offsets[group], groups.candidate_offsets[group + 1])
        rows_C = groups.candidate_rows_M[members]
        members = members[(rows_C >= 0) & (inverse_V[rows_C] > 0)]
        at_n = np.flatnonzero((rows_n >= 0) & (inverse_V[rows_n] > 0))
        if not len(at_n) or not len(members):
            continue
        behaviors_nD = _unit(table_VD, inverse_V, rows_n[at_n])
        candidates_CD = _unit(table_VD, inverse_V, groups.candidate_rows_M[members])
        seen_C = np.searchsorted(at_n, groups.visible_M[members])
        if index == "items":
            places_CP = _by_items(
                behaviors_nD, rows_n[at_n], candidates_CD, seen_C, listed_MP.shape[1], config
            )
        else:
            places_CP = _by_index(behaviors_nD, candidates_CD, seen_C, listed_MP.shape[1], index, config)
        listed_MP[members] = np.where(places_CP >= 0, at_n[places_CP], -1)
        n_valid_M[members] = seen_C
    return _ordered(table_VD, groups, listed_MP, n_valid_M, k=k, recent=recent)


def _by_index(
    behaviors_nD: np.ndarray,
    candidates_CD: np.ndarray,
    seen_C: np.ndarray,
    listed: int,
    index: Index,
    config: TwoStepConfig,
) -> np.ndarray:
    """Nearest by a faiss index of one user's history; each request sees its own prefix of it."""
    width = behaviors_nD.shape[1]
    if index == "hnsw":
        graph = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
    else:
        lists = config.lists or max(1, int(4 * len(behaviors_nD) ** 0.5))
        graph = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        graph.cp.min_points_per_centroid, graph.cp.seed = 1, config.seed + 1
        graph.cp.max_points_per_centroid, graph.cp.niter = 64, 5
        graph.train(behaviors_nD)
    graph.add(behaviors_nD)
    places_CP = np.full((len(candidates_CD), listed), -1, dtype=np.int64)
    for seen in np.unique(seen_C[seen_C > 0]):
        prefix = faiss.IDSelectorRange(0, int(seen))
        if index == "hnsw":
            how = faiss.SearchParametersHNSW(efSearch=max(config.breadth, listed), sel=prefix)
        else:
            how = faiss.SearchParametersIVF(nprobe=config.probe, sel=prefix)
        same = seen_C == seen
        places_CP[same] = graph.search(candidates_CD[same], listed, params=how)[1]
    return places_CP


def _by_items(
    behaviors_nD: np.ndarray,
    rows_n: np.ndarray,
    candidates_CD: np.ndarray,
    seen_C: np.ndarray,
    listed: int,
    config: TwoStepConfig,
) -> np.ndarray:
    """Neighbours of the candidate among the distinct items of the history; their latest occurrences."""
    items, first_I, item_n = np.unique(rows_n, return_index=True, return_inverse=True)
    wanted = min(config.neighbors, len(items))
    near_CW = faiss.knn(candidates_CD, behaviors_nD[first_I], wanted, metric=faiss.METRIC_INNER_PRODUCT)[1]
    by_item = np.argsort(item_n, kind="stable")
    ends = np.cumsum(np.bincount(item_n, minlength=len(items)))
    places_CP = np.full((len(candidates_CD), listed), -1, dtype=np.int64)
    for c, near_W in enumerate(near_CW):
        runs = [by_item[ends[i - 1] if i else 0 : ends[i]] for i in near_W]
        # Nearest item first, its occurrences latest first, until the list is full.
        places = np.concatenate([run[run < seen_C[c]][::-1] for run in runs])[:listed]
        places_CP[c, : len(places)] = places
    return places_CP


def _ordered(
    table_VD: np.ndarray, groups: Groups, listed_MP: np.ndarray, n_valid_M: np.ndarray, *, k: int, recent: int
) -> TopK:
    sims_MP, recent_MS = cosines_at(table_VD, groups, listed_MP, recent=recent, dtype=np.float64)
    usable_MP = (listed_MP >= 0) & (sims_MP != 0)
    order_MP = np.lexsort((-listed_MP, np.where(usable_MP, -sims_MP, 9.0)))[:, :k]
    found = empty_topk(len(listed_MP), k=k, recent=0)
    kept_MK = np.take_along_axis(usable_MP, order_MP, axis=1)
    found.positions_MK[kept_MK] = np.take_along_axis(listed_MP, order_MP, axis=1)[kept_MK]
    found.sims_MK[kept_MK] = np.take_along_axis(sims_MP, order_MP, axis=1)[kept_MK]
    kept_M = kept_MK.sum(1)
    # A row that the index could not fill says how many it has: the histogram sums to min(K, n_valid).
    return found._replace(
        n_valid_M=np.where(kept_M == k, n_valid_M, kept_M).astype(np.int32), recent_MS=recent_MS
    )


def _recall(
    table_VD: np.ndarray, groups: Groups, step: TopK, config: TwoStepConfig, *, k: int, threads: int
) -> Recall:
    """Exact positions of a sample of candidates against those found."""
    candidates = len(groups.candidate_rows_M)
    rng = np.random.default_rng(config.seed)
    sample = np.sort(rng.permutation(candidates)[: config.sample])
    within_G = np.searchsorted(sample, groups.candidate_offsets)
    asked = groups._replace(
        candidate_rows_M=groups.candidate_rows_M[sample],
        candidate_offsets=within_G,
        visible_M=groups.visible_M[sample],
    )
    exact = topk(table_VD, asked, k=k, recent=0, threads=threads).positions_MK
    found = step.positions_MK[sample]
    hits = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(exact, found, strict=True))
    return Recall(hits, int((exact >= 0).sum()))


def _unit(table_VD: np.ndarray, inverse_V: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray((table_VD[rows] * inverse_V[rows, None]).astype(np.float32))
