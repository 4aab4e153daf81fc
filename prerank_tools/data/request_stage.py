"""Requests from a log: what a user bought at a time, among candidates that were not bought."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from prerank_tools.data.baskets import earliest, latest
from prerank_tools.data.known_frames import Known, encode, read_known, write_known
from prerank_tools.data.negatives import draw_negatives, shuffled
from prerank_tools.data.stage import basket_codes, events_and_faults, show, time_span
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.metrics.ranking import auc_per_group
from prerank_tools.stage import Context, Part, Shard, Stage
from prerank_tools.tables.bucketing import hash_ids
from prerank_tools.tables.events import open_events
from prerank_tools.tables.spill import blocks_of
from prerank_tools.tables.table import Table

Negatives = Literal["popularity", "uniform"]
KINDS: tuple[str, ...] = get_args(Negatives)


class RequestKnobs(BaseModel):
    """How many negatives a request gets, and which ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    negatives_per_request: int = Field(default=50, ge=1)
    seed: int = Field(default=0, ge=0)
    lag: int = Field(default=0, ge=0)  # seconds between an event's arrival and its use


DEFAULTS = RequestKnobs()


@dataclass(frozen=True)
class Requests(Stage):
    """One request a basket: its user, its time, the items bought and negatives, in a drawn order.

    The main table has the negatives that were asked for, the side table the other kind: popularity negatives
    follow the log before the request, uniform ones take each item alike. With a catalogue the candidates are
    its items, without one the items seen before the request. An item of the basket is never a negative.
    """

    events: Path
    items: Path | None = None
    start: int | None = None
    until: int | None = None
    negatives: Negatives = "popularity"
    action: str = "purchase"
    knobs: RequestKnobs = DEFAULTS

    name: ClassVar[str] = "data.requests"
    output: ClassVar[str] = "requests"

    @property
    def tables(self) -> Mapping[str, str]:  # type: ignore[override]
        """The other kind of negatives."""
        return {kind: "requests" for kind in KINDS if kind != self.negatives}

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        """The whole log, and the catalogue where there is one."""
        items = {"items": (self.items, "items")} if self.items else {}
        return {"events": (self.events, "events"), **items}

    def params(self) -> Mapping[str, Any]:
        """Period, negatives, label and knobs."""
        return {
            "from": self.start,
            "until": self.until,
            "negatives": self.negatives,
            "action": self.action,
            **self.knobs.model_dump(),
        }

    def check(self, ctx: Context) -> None:
        """Refuse a period without events and an action that the log does not know."""
        first, last = time_span(ctx.table("events"))
        if (self.start or first) > last or (self.until or last + 1) <= first:
            raise UsageError(
                f"{self.events}: no events from {self.start} until {self.until}",
                f"its events lie from {show(first)} to {show(last)}",
            )
        if "action" in ctx.table("events").schema:
            blocks = (block["action"].unique() for block in blocks_of(ctx.table("events"), ["action"]))
            actions = pl.concat(list(blocks)).drop_nulls().unique()
            if self.action not in actions:
                raise ContractError(
                    f"{self.events}: no event has the action `{self.action}`",
                    f"--action takes one of {', '.join(actions.sort())}",
                )

    def prepare(self, ctx: Context) -> None:
        """Lay down what was known when: item ids, and a pool for each kind of negatives."""
        catalogue = None
        if self.items:
            catalogue = ctx.table("items").read(["item_id"])["item_id"]
            ids = ctx.table("events").scan(["item_id"]).collect_schema()["item_id"]
            _same_ids(catalogue.dtype, ids, self.items, self.events)
        bought = partial(self._bought, ctx.table("events"))
        write_known(ctx.scratch / "known", bought, catalogue=catalogue, lag=self.knobs.lag)

    def _bought(self, log: Table) -> Iterator[pl.DataFrame]:
        """The log's events of the action, block by block."""
        late = [name for name in ("ingested_at", "action") if name in log.schema]
        for block in blocks_of(log, ["item_id", "timestamp", *late]):
            yield _of_action(block.drop_nulls(["item_id", "timestamp"]), self.action)

    def plan(self, ctx: Context) -> Sequence[Shard]:
        """One shard a bucket of users."""
        return open_events(ctx.table("events")).shards()

    def process(self, shard: Shard, ctx: Context) -> Part:
        """The requests of one bucket, with both kinds of negatives."""
        events, bad = events_and_faults(open_events(ctx.table("events")), shard.extra["bucket"])
        if "known" not in ctx.cache:
            ctx.cache["known"] = read_known(ctx.scratch / "known")
        known: Known = ctx.cache["known"]
        requests, counts = self._baskets(_of_action(events, self.action), known)
        counts["rows_in"] = len(events) + len(bad)
        made = {kind: self._with_candidates(requests, known, kind) for kind in KINDS}
        for kind in KINDS:
            counts |= _popularity_auc(made[kind], known, kind)
            counts[f"negatives_{kind}"] = sum(int((labels == 0).sum()) for labels in made[kind].labels)
        frames = {kind: _frame(made[kind], known, self.action) for kind in KINDS}
        main = frames.pop(self.negatives)
        return Part(main, quarantine=bad, counts=counts, tables=frames)

    def quality(self, counts: Mapping[str, float], ctx: Context) -> Mapping[str, Any]:
        """Popularity's own AUC inside a request, for each kind: what any model must be seen beside."""
        if not counts["requests"]:
            raise ContractError(
                f"{self.events}: no basket in the period has an item that was a candidate",
                "choose an earlier --from, or give the catalogue with --items",
            )
        log = open_events(ctx.table("events"))
        auc = {kind: counts[f"auc_sum_{kind}"] / max(counts[f"auc_rows_{kind}"], 1) for kind in KINDS}
        return {"popularity_auc": auc, "layout": {"by": "user_id", "buckets": log.buckets}}

    def data_cutoff(self, ctx: Context) -> int | None:
        """The latest event of the period: later ones shape no request."""
        times = ctx.table("events").scan(["timestamp"])
        if self.until is not None:
            times = times.filter(pl.col("timestamp") < self.until)
        return int(times.max().collect().item())

    def _baskets(self, events: pl.DataFrame, known: Known) -> tuple[pl.DataFrame, dict[str, int | float]]:
        """One row a basket that lies whole in the period: user, time, codes of its known items."""
        basket_n, time_n = basket_codes(events), events["timestamp"].to_numpy()
        inside_B, first_B = self._inside(basket_n, time_n)
        lines = events.select(
            "user_id",
            time=pl.Series(first_B[basket_n]),
            basket=pl.Series(basket_n),
            code=pl.Series(encode(events["item_id"], known.ids)),
        ).filter(pl.Series(inside_B[basket_n]))
        code_n, time_n = lines["code"].to_numpy(), lines["time"].to_numpy()
        was_known = (code_n >= 0) & (known.candidate_from[code_n] < time_n)
        requests = (
            lines.filter(pl.Series(was_known))
            .group_by("user_id", "time", "basket")
            .agg(pl.col("code").unique().sort())
            .sort("user_id", "time", "basket")
        )
        counts: dict[str, int | float] = {
            "requests": len(requests),
            "baskets_skipped": int(inside_B.sum()) - len(requests),
            "bought_unknown": int((~was_known).sum()),
        }
        return requests.with_columns(request_id=_request_ids(requests)), counts

    def _inside(self, basket_n: np.ndarray, time_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which baskets lie whole in the period, and when each began."""
        first_B, last_B = earliest(basket_n, time_n), latest(basket_n, time_n)
        inside_B = np.ones(len(first_B), dtype=bool)
        if self.start is not None:
            inside_B &= first_B >= self.start
        if self.until is not None:
            inside_B &= last_B < self.until
        return inside_B, first_B

    def _with_candidates(self, requests: pl.DataFrame, known: Known, kind: str) -> Candidates:
        time_R, positives = requests["time"].to_numpy(), [codes.to_numpy() for codes in requests["code"]]
        keys_R, knobs = hash_ids(requests["request_id"]), self.knobs
        drawn = draw_negatives(
            known.pools[kind],
            time_R,
            keys_R=keys_R,
            positives=positives,
            count=knobs.negatives_per_request,
            seed=knobs.seed,
        )
        codes, labels = [], []
        for key, bought, negatives in zip(keys_R, positives, drawn, strict=True):
            both = np.r_[bought, negatives]
            order = shuffled(both, key=int(key), seed=knobs.seed)
            codes.append(both[order])
            labels.append((order < len(bought)).astype(np.int8))
        return Candidates(requests, codes, labels)


@dataclass(frozen=True)
class Candidates:
    """Requests with their candidates, as codes, and the labels."""

    requests: pl.DataFrame
    codes: list[np.ndarray]
    labels: list[np.ndarray]


def _of_action(events: pl.DataFrame, action: str) -> pl.DataFrame:
    return events.filter(pl.col("action") == action) if "action" in events.columns else events


def _same_ids(one: pl.DataType, other: pl.DataType, items: Path, events: Path) -> None:
    if one != other:
        raise ContractError(
            f"{items}: item_id is {one}, in {events} it is {other}", "write both with one type"
        )


def _request_ids(requests: pl.DataFrame) -> pl.Series:
    """`user-time`, and `user-time.2` for a second basket of that user at that time."""
    place = pl.int_range(pl.len()).over("user_id", "time") + 1
    name = pl.format("{}-{}", "user_id", "time")
    more = pl.format("{}.{}", name, place)
    return requests.select(request_id=pl.when(place == 1).then(name).otherwise(more))["request_id"]


def _frame(made: Candidates, known: Known, action: str) -> pl.DataFrame:
    size_R = np.array([len(codes) for codes in made.codes], dtype=np.int64)
    flat = pl.DataFrame(
        {
            "row": np.repeat(np.arange(len(size_R)), size_R),
            "candidates": known.ids.gather(_flat(made.codes, np.int64)),
            f"label_{action}": _flat(made.labels, np.int8),
        }
    )
    lists = flat.group_by("row", maintain_order=True).agg("candidates", f"label_{action}")
    named = made.requests.select("request_id", "user_id", timestamp="time")
    return pl.concat([named, lists.drop("row")], how="horizontal")


def _flat(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)


def _popularity_auc(made: Candidates, known: Known, kind: str) -> dict[str, int | float]:
    """Sums for the mean over requests, weighted by candidates, of the AUC that popularity reaches (GAUC)."""
    if not made.codes:
        return {f"auc_sum_{kind}": 0.0, f"auc_rows_{kind}": 0}
    size_R = np.array([len(codes) for codes in made.codes])
    time_n = np.repeat(made.requests["time"].to_numpy(), size_R)
    score_n = known.popularity.before(np.concatenate(made.codes), time_n)
    group_n = np.repeat(np.arange(len(size_R)), size_R)
    auc_R, rows_R = auc_per_group(np.concatenate(made.labels), score_n, group_n)
    usable = ~np.isnan(auc_R)
    return {
        f"auc_sum_{kind}": float(auc_R[usable] @ rows_R[usable]),
        f"auc_rows_{kind}": int(rows_R[usable].sum()),
    }
