"""`eval sid`: judge SIDs without training a recommender: use, reconstruction, neighbours, meaning."""

# N items of the table that have a SID, L levels, D dims, Q queries
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prerank_tools.data.pairs import bought_together
from prerank_tools.data.stage import basket_codes
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.metrics.bootstrap import mean_interval
from prerank_tools.quantizers.codebook import Quantizer
from prerank_tools.quantizers.duplicates import content_groups, duplicate_floor, row_hashes
from prerank_tools.quantizers.eval_sids_stage import Sids, check_space, rows_of
from prerank_tools.quantizers.fit_stage import read_vectors
from prerank_tools.quantizers.level_means import LevelMeans, fit_level_means
from prerank_tools.quantizers.neighbours import nearest_rows, neighbour_recall, sample_rows
from prerank_tools.quantizers.residuals import comparable
from prerank_tools.quantizers.sid_keys import pack_codes, unpack_codes
from prerank_tools.quantizers.sid_meaning import behavior_lift, prefix_meaning
from prerank_tools.quantizers.sid_metrics import Reconstruction, SidCounts
from prerank_tools.quantizers.verdict import advise_sizes, compare, judge
from prerank_tools.tables.bucketing import hash_ids
from prerank_tools.tables.table import Table, open_table, shards_of

NEIGHBOURS = 10
PARTNERS = 4  # of one basket's row: pairs stay linear in the size of a basket
BLOCK = 65_536  # distinct SIDs decoded at once


@dataclass(frozen=True)
class EvalInputs:
    """What SIDs are judged against; every part is optional and adds its numbers."""

    embeddings: Path | None = None
    codebook: Path | None = None
    fitted_on: Path | None = None
    items: Path | None = None
    categories: Sequence[str] = ()
    events: Path | None = None
    queries: int = 10_000
    seed: int = 0
    threads: int = 2


def evaluate_sids(sids: Path, inputs: EvalInputs, *, against: Path | None = None) -> dict[str, Any]:
    """Numbers and verdict of a SID table or of an export in any format; with `against`, an A/B of two.

    Raises ContractError where a table does not fit another, UsageError where a flag lacks its partner.
    """
    if inputs.categories and inputs.items is None:
        raise UsageError("--category needs --items", "name the item table that holds the column")
    if inputs.embeddings is None and (inputs.codebook or inputs.fitted_on):
        raise UsageError("a codebook is judged on vectors", "add --embeddings EMB")
    ours = _evaluate(Sids.open(sids, inputs.codebook), inputs)
    if against is None:
        return ours
    theirs = _evaluate(Sids.open(against, None), inputs)
    verdicts = {row.pop("metric"): row for row in compare(_headline(ours), _headline(theirs))}
    return {"compare": verdicts, "A": ours, "B": theirs}


def _evaluate(sids: Sids, inputs: EvalInputs) -> dict[str, Any]:
    counts = SidCounts(sids.sizes)
    counts.update(sids.codes_NL)
    use = counts.finalize()
    found: dict[str, Any] = {"items": use.items, "sizes": list(sids.sizes)}
    floor = 0.0
    if inputs.embeddings is not None:
        table = open_table(inputs.embeddings, "item_embeddings")
        check_space(sids, table)
        vectors = _Vectors.join(table, sids)
        floor = duplicate_floor(content_groups(vectors.hash_N))
        found |= _space(vectors, sids, inputs)
    found["duplicate_floor"] = floor
    found |= _use(use.as_dict(), floor, sids)
    if inputs.items is not None:
        found["category"] = _categories(sids, open_table(inputs.items, "items"), inputs)
    if inputs.events is not None:
        found["together"] = _together(sids, open_table(inputs.events, "events"), inputs.seed)
    found["verdict"] = {
        str(number): asdict(finding) for number, finding in enumerate(judge(use, floor=floor), 1)
    }
    found["sizes_advised"] = list(advise_sizes(use.items, levels=len(sids.sizes)))
    return found


def _use(use: dict[str, Any], floor: float, sids: Sids) -> dict[str, Any]:
    levels = use.pop("levels")
    use["collision_above_floor"] = max(use["collision_rate"] - floor, 0.0)
    if sids.suffix_N is not None:
        whole = np.column_stack([sids.codes_NL, sids.suffix_N])
        distinct = len(np.unique(pack_codes(whole, (*sids.sizes, int(sids.suffix_N.max()) + 1))))
        use["collision_rate_with_suffix"] = 1 - distinct / len(whole)
    return use | {f"level_{number}": level for number, level in enumerate(levels, 1)}


@dataclass(frozen=True)
class _Vectors:
    """The embedding table, and for each of its good rows that has a SID: the SID's row and a content hash."""

    table: Table
    row_N: np.ndarray
    hash_N: np.ndarray
    without_sid: int

    @staticmethod
    def join(table: Table, sids: Sids) -> _Vectors:
        rows, hashes, good = [], [], 0
        for frame, x_nD in _good(table):
            row_n = rows_of(frame["item_id"], sids.ids)
            good += len(frame)
            rows.append(row_n[row_n >= 0])
            hashes.append(row_hashes(x_nD[row_n >= 0]))
        row_N = np.concatenate(rows)
        if not len(row_N):
            raise ContractError(
                f"{table.path}: no item of it has a SID", "give the embeddings that were quantized"
            )
        return _Vectors(table, row_N, np.concatenate(hashes), good - len(row_N))

    def blocks(self, sids: Sids) -> Iterator[np.ndarray]:
        """Vectors float32, block by block, in the order of `row_N`."""
        for frame, x_nD in _good(self.table):
            x_nD = x_nD[rows_of(frame["item_id"], sids.ids) >= 0]
            yield x_nD.astype(np.float32) if sids.quantizer is None else comparable(sids.quantizer, x_nD)


def _space(vectors: _Vectors, sids: Sids, inputs: EvalInputs) -> dict[str, Any]:
    """Reconstruction and neighbours. Without a codebook each level's codes stand for their mean residual."""
    codes_NL = sids.codes_NL[vectors.row_N]
    quantizer: Quantizer | LevelMeans
    if sids.quantizer is not None:
        quantizer = sids.quantizer
    else:
        quantizer = fit_level_means(lambda: vectors.blocks(sids), codes_NL, sids.sizes)
    query_Q = sample_rows(len(codes_NL), inputs.queries, seed=inputs.seed)
    whole, unseen, queries = Reconstruction(), Reconstruction(), []
    seen_N = _seen(vectors, sids, inputs)
    start = 0
    for x_ND in vectors.blocks(sids):
        rows = slice(start, start + len(x_ND))
        decoded_ND = quantizer.decode(codes_NL[rows])
        whole.update(x_ND, decoded_ND)
        unseen.update(x_ND[~seen_N[rows]], decoded_ND[~seen_N[rows]])
        queries.append(x_ND[query_Q[(query_Q >= start) & (query_Q < rows.stop)] - start])
        start = rows.stop
    found: dict[str, Any] = {
        "embedded_without_sid": vectors.without_sid,
        "sid_without_embedding": len(sids.ids) - len(codes_NL),
        "decoded_by": "codebook" if sids.quantizer is not None else "mean of each code's residuals",
        **whole.finalize(),
    }
    if unseen.items:
        found["not_fitted"] = {"items": unseen.items, **unseen.finalize()}
    return found | _neighbours(vectors, sids, quantizer, codes_NL, query_Q, np.concatenate(queries), inputs)


def _neighbours(
    vectors: _Vectors,
    sids: Sids,
    quantizer: Quantizer | LevelMeans,
    codes_NL: np.ndarray,
    query_Q: np.ndarray,
    query_QD: np.ndarray,
    inputs: EvalInputs,
) -> dict[str, Any]:
    if len(codes_NL) <= NEIGHBOURS:
        return {}
    _, truth_QT = nearest_rows(query_QD, vectors.blocks(sids), k=NEIGHBOURS, skip_Q=query_Q)
    key_N = pack_codes(codes_NL, sids.sizes)
    key_M, count_M = np.unique(key_N, return_counts=True)
    decoded = (
        quantizer.decode(unpack_codes(key_M[at : at + BLOCK], sids.sizes))
        for at in range(0, len(key_M), BLOCK)
    )
    recall_Q = neighbour_recall(
        key_N[truth_QT],
        quantizer.decode(codes_NL[query_Q]),
        key_N[query_Q],
        key_M=key_M,
        count_M=count_M,
        blocks=decoded,
    )
    interval = mean_interval(recall_Q, np.arange(len(recall_Q)), seed=inputs.seed)
    return {
        "neighbour_recall": interval.value,
        "neighbour_recall_low": interval.low,
        "neighbour_recall_high": interval.high,
        "neighbour_queries": len(recall_Q),
    }


def _seen(vectors: _Vectors, sids: Sids, inputs: EvalInputs) -> np.ndarray:
    """Which rows the codebook was fitted on: those of `fitted_on`; all, where that is not known."""
    if inputs.fitted_on is None:
        return np.ones(len(vectors.row_N), dtype=bool)
    fitted = open_table(inputs.fitted_on, "item_embeddings").scan(["item_id"]).collect()["item_id"]
    return np.asarray(rows_of(sids.ids, fitted)[vectors.row_N] >= 0)


def _categories(sids: Sids, items: Table, inputs: EvalInputs) -> dict[str, Any]:
    missing = [name for name in inputs.categories if name not in items.schema]
    if missing:
        raise ContractError(f"{items.path}: no column `{missing[0]}`", f"it has {', '.join(items.schema)}")
    found: dict[str, Any] = {}
    for name in inputs.categories:
        frame = items.scan(["item_id", name]).drop_nulls().collect()
        row_n = rows_of(frame["item_id"], sids.ids)
        held = frame[name].cast(pl.String).rank("dense").to_numpy()[row_n >= 0]
        depths = prefix_meaning(sids.codes_NL[row_n[row_n >= 0]], held, sizes=sids.sizes, seed=inputs.seed)
        found[name] = {f"depth_{meaning.depth}": meaning.as_dict() for meaning in depths}
    return found


def _together(sids: Sids, events: Table, seed: int) -> dict[str, Any]:
    """Lift over the baskets of purchases, or of all events where the log names none."""
    wanted = [name for name in ("basket_id", "session_id", "action") if name in events.schema]
    log = (
        events.scan(["user_id", "item_id", "timestamp", *wanted]).drop_nulls(["user_id", "item_id"]).collect()
    )
    if "action" in log.columns and (log["action"] == "purchase").any():
        log = log.filter(pl.col("action") == "purchase")
    log = log.with_columns(
        pl.Series("basket", basket_codes(log)), pl.Series("row", rows_of(log["item_id"], sids.ids))
    )
    log = log.filter(pl.col("row") >= 0).unique(["basket", "row"], keep="first", maintain_order=True)
    row_n = log["row"].to_numpy()
    word_n = hash_ids(log["item_id"]) ^ np.random.default_rng(seed).integers(0, 2**63, dtype=np.uint64)
    left_E, right_E = bought_together(log["basket"].to_numpy(), word_n, partners=PARTNERS)
    lifts = behavior_lift(sids.codes_NL, row_n[left_E], row_n[right_E], sizes=sids.sizes)
    return {"pairs": len(left_E), **{f"depth_{lift.depth}": lift.as_dict() for lift in lifts}}


def _headline(report: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in report.items() if isinstance(value, (int, float))}


def _good(table: Table) -> Iterator[tuple[pl.DataFrame, np.ndarray]]:
    for shard in shards_of(table):
        frame, x_nD, _ = read_vectors(shard)
        yield frame, x_nD
