"""`score`: requests and a scorer in, candidates in rank order out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch

from prerank_tools.errors import ContractError
from prerank_tools.scorers import artefact, request_frames
from prerank_tools.scorers.artefact import ScorerSpec
from prerank_tools.scorers.checks import check_cutoffs, check_given, check_inputs, check_spaces
from prerank_tools.scorers.input_frames import (
    Chunk,
    InputPaths,
    ScorerInputs,
    bucket_shards,
    open_scorer_inputs,
)
from prerank_tools.scorers.serving import CachedScorer
from prerank_tools.stage import Context, Part, Shard, Stage


@dataclass(frozen=True)
class Score(Stage):
    """request_id, item_id, rank, score and p_<task>, the best `top` of every request.

    The score is the product of the tasks' probabilities. What a request is scored on was known strictly
    before it. Ties fall to the smaller item id.
    """

    name: ClassVar[str] = "score"
    output: ClassVar[str] = "scores"
    sort_key: ClassVar[tuple[str, ...]] = ("request_id", "rank")

    paths: InputPaths
    model: Path
    top: int | None = None
    missing: Literal["zero", "fail"] = "zero"

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        """The tables and the scorer."""
        return self.paths.roles() | {"model": (self.model, "")}

    def params(self) -> Mapping[str, Any]:
        """How many to keep, and what a candidate without a vector is."""
        return {"top": self.top, "missing": self.missing}

    def check(self, ctx: Context) -> None:
        """Refuse inputs of another space than the scorer's, or that have seen the requests' time."""
        spec = artefact.read_spec(self.model)
        check_inputs(ctx, spec.inputs)
        check_given(ctx, spec)
        check_spaces(ctx)
        check_cutoffs(ctx, request_frames.first_time(ctx.table("requests")), what="the first request")

    def plan(self, ctx: Context) -> Sequence[Shard]:
        """One shard a bucket of users."""
        return bucket_shards(ctx)

    def process(self, shard: Shard, ctx: Context) -> Part:
        """Score one bucket; the item cache starts empty, so nothing depends on the workers."""
        spec, inputs, scorer = self._open(ctx)
        counts: dict[str, int | float] = {}
        frames = [empty_scores(ctx, spec)]
        good, bad = inputs.requests(shard.extra["bucket"])
        for chunk in inputs.chunks(good, bucket=shard.extra["bucket"], tasks=()):
            if self.missing == "fail" and chunk.counts["without_vector"]:
                raise ContractError(
                    f"{self.paths.embeddings}: {chunk.counts['without_vector']} candidates have no vector",
                    "prerank embed items ITEMS -o emb/, or --missing zero",
                )
            frames.append(score_chunk(chunk, scorer, spec, device=ctx.device, top=self.top))
            for name, number in chunk.counts.items():
                counts[name] = counts.get(name, 0) + number
        done = scorer.rows
        counts |= {
            "rows_in": len(good) + len(bad),
            "user_rows": done.user,
            "item_rows": done.item,
            "candidate_rows": done.candidate,
        }
        return Part(pl.concat(frames).sort(self.sort_key), quarantine=bad, counts=counts)

    def quality(self, counts: Mapping[str, float], ctx: Context) -> Mapping[str, Any]:
        """Share of requests and candidates scored on less, and of item vectors from the cache."""
        candidates, requests = max(counts.get("candidates", 0), 1), max(counts.get("requests", 0), 1)
        found = {
            "without_vector_share": counts.get("without_vector", 0) / candidates,
            "empty_history_share": counts.get("empty_histories", 0) / requests,
            "item_cache_hit_share": 1 - counts.get("item_rows", 0) / candidates,
        }
        return found | (
            {"cold_user_share": counts["cold_users"] / requests} if "cold_users" in counts else {}
        )

    def data_cutoff(self, ctx: Context) -> int | None:
        """What the model and the fitted tables had seen; the log is read strictly as of each request."""
        cutoffs = [t.data_cutoff for role, t in ctx.inputs.items() if role not in ("requests", "events")]
        return max((cutoff for cutoff in cutoffs if cutoff is not None), default=None)

    def lineage(self, ctx: Context) -> Mapping[str, str]:
        """The spaces of the model."""
        return dict(ctx.inputs["model"].lineage)

    def _open(self, ctx: Context) -> tuple[ScorerSpec, ScorerInputs, CachedScorer]:
        if "scorer:model" not in ctx.cache:
            ctx.cache["scorer:model"] = artefact.load(self.model, device=ctx.device)
        spec, model = ctx.cache["scorer:model"]
        inputs = open_scorer_inputs(
            ctx,
            spec.inputs,
            vocabularies=spec.vocabularies,
            with_users=spec.user > 0,
            with_sids=spec.levels > 0,
        )
        items = inputs.catalogue.arrays
        features = ":".join(ctx.inputs[r].digest for r in ("items", "embeddings", "sids") if r in ctx.inputs)
        arrays = (
            torch.from_numpy(items.item_NF).to(ctx.device),
            torch.from_numpy(items.codes_NC).to(ctx.device),
        )
        return spec, inputs, CachedScorer(model, *arrays, features=features)


def score_chunk(
    chunk: Chunk, scorer: CachedScorer, spec: ScorerSpec, *, device: str, top: int | None
) -> pl.DataFrame:
    """Probabilities, scores and ranks of some requests."""
    arrays = chunk.arrays
    prob_nK = scorer.probabilities(
        torch.from_numpy(arrays.user_RF).to(device),
        torch.from_numpy(arrays.request_n).to(device),
        arrays.item_n,
        torch.from_numpy(arrays.cross_nF).to(device),
    )
    scores_n = prob_nK.prod(axis=1).astype(np.float32)
    ranks_n = rank_within(scores_n, arrays.request_n)
    columns = {f"p_{task}": prob_nK[:, k].astype(np.float32) for k, task in enumerate(spec.shape.tasks)}
    frame = chunk.flat.candidates.select("request_id", "item_id").with_columns(
        pl.Series("rank", ranks_n, dtype=pl.Int32),
        pl.Series("score", scores_n),
        *(pl.Series(name, values) for name, values in columns.items()),
    )
    return frame if top is None else frame.filter(pl.col("rank") <= top)


def rank_within(scores_n: np.ndarray, request_n: np.ndarray) -> np.ndarray:
    """Rank from 1 of each row inside its request, best first; ties keep the order of the rows."""
    order_n = np.lexsort((-scores_n, request_n))
    first_n = np.r_[True, np.diff(request_n[order_n]) != 0]
    start_n = np.maximum.accumulate(np.where(first_n, np.arange(len(order_n)), 0))
    ranks_n = np.empty(len(order_n), dtype=np.int32)
    ranks_n[order_n] = np.arange(len(order_n)) - start_n + 1
    return ranks_n


def empty_scores(ctx: Context, spec: ScorerSpec) -> pl.DataFrame:
    """A scores table without rows, of the ids' types: what a bucket without requests gives."""
    requests = ctx.table("requests")
    item = "candidates" if "candidates" in requests.schema else "item_id"
    ids = requests.scan(["request_id", item]).collect_schema()
    item_type = ids[item].inner if item == "candidates" else ids[item]  # type: ignore[attr-defined]
    schema = {"request_id": ids["request_id"], "item_id": item_type, "rank": pl.Int32, "score": pl.Float32}
    return pl.DataFrame(schema=schema | {f"p_{task}": pl.Float32 for task in spec.shape.tasks})
