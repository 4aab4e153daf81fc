"""`prerank data`: Check, bucket, split and sample tables."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import parse_knobs, report_command, stage_command
from .times import Until, time_option

app = typer.Typer(name="data", help="Check, bucket, split and sample tables.", no_args_is_help=True)

Events = Annotated[Path, typer.Argument(help="Behaviour log: a Parquet file or a folder of them.")]
TablePath = Annotated[Path, typer.Argument(help="Any table: a Parquet file or a folder of them.")]
Contract = Annotated[str, typer.Option(help="What the table is; told from its columns where not given.")]
Action = Annotated[str, typer.Option(help="The behaviour that counts as a positive.")]


class Keyed(StrEnum):
    """Tables that later stages read user by user."""

    events = "events"
    requests = "requests"


class Negatives(StrEnum):
    """How negatives are drawn."""

    popularity = "popularity"
    uniform = "uniform"


class PairKind(StrEnum):
    """What makes a pair."""

    search = "search"
    copurchase = "copurchase"
    image_title = "image_title"


@report_command(
    app,
    "validate",
    examples=(
        "prerank data validate events.parquet",
        "prerank data validate items.parquet --contract items --json",
    ),
)
def validate(
    table: TablePath,
    contract: Contract = "",
    max_bad: Annotated[float, typer.Option(help="Share of unusable rows that is still accepted.")] = 0.001,
) -> dict[str, Any]:
    """Check a table against its contract: columns, types, key, times and every row."""
    from prerank_tools.tables.report import validate

    return validate(table, contract, max_bad=max_bad)


@report_command(
    app,
    "describe",
    examples=("prerank data describe events.parquet", "prerank data describe events/ --json"),
)
def describe(table: TablePath, contract: Contract = "") -> dict[str, Any]:
    """Show sizes, types, nulls, the time span, and how rows spread over users and items."""
    from prerank_tools.tables.report import describe

    return describe(table, contract)


@stage_command(
    app,
    "partition",
    examples=(
        "prerank data partition events.parquet --buckets 8 -o events_by_user/",
        "prerank data partition day2.parquet --append-to events_by_user/ -o events_by_user_day2/",
    ),
)
def partition(
    rows: TablePath,
    by: Annotated[str, typer.Option(help="Id whose rows stay together.")] = "user_id",
    buckets: Annotated[
        int | None,
        typer.Option(min=1, help="Number of buckets; by the rows where not given.", show_default=False),
    ] = None,
    append_to: Annotated[
        Path | None,
        typer.Option(help="An earlier partition: its parts are linked, only the new rows are written."),
    ] = None,
    contract: Annotated[Keyed, typer.Option(help="What the rows are.")] = Keyed.events,
) -> Any:
    """Sort a log into buckets of users, in bounded memory; append a day to an earlier one."""
    from prerank_tools.data.stage import Partition

    return Partition(rows, by=by, buckets=buckets, append_to=append_to, contract=contract.value)


@stage_command(
    app,
    "split",
    examples=(
        "prerank data split events.parquet --at 2011-10-11 -o split/",
        "prerank data split events.parquet --at 1318291200 -o split_at/",
    ),
)
def split(
    events: Events,
    at: Annotated[int, time_option("--at", help="Where test begins: epoch seconds or a date.")],
) -> Any:
    """Cut a log in time by whole basket, into train/ and test/."""
    from prerank_tools.data.stage import Split

    return Split(events, at=at)


@stage_command(
    app,
    "requests",
    examples=(
        "prerank data requests events.parquet --from 2011-10-11 -o requests/",
        "prerank data requests events.parquet --items items.parquet --from 2011-09-01 --until 2011-10-11 "
        "-o train_requests/",
    ),
)
def requests(
    events: Events,
    items: Annotated[
        Path | None, typer.Option(help="Catalogue; without it an item is a candidate once it was seen.")
    ] = None,
    start: Annotated[
        int | None, time_option("--from", help="Only baskets that begin at this time or later.")
    ] = None,
    until: Annotated[
        int | None, time_option("--until", help="Only baskets that end before this time.")
    ] = None,
    negatives: Annotated[
        Negatives, typer.Option(help="Negatives of the main table; the other kind lies beside it.")
    ] = Negatives.popularity,
    action: Action = "purchase",
    knobs: dict[str, Any] | None = None,
) -> Any:
    """Make one request a basket: candidates with labels, negatives written down once."""
    from prerank_tools.data.request_stage import RequestKnobs, Requests

    return Requests(
        events,
        items=items,
        start=start,
        until=until,
        negatives=negatives.value,
        action=action,
        knobs=parse_knobs(RequestKnobs, knobs or {}),
    )


@stage_command(
    app,
    "pairs",
    examples=(
        "prerank data pairs --events events.parquet --items items.parquet --kind copurchase -o pairs/",
        "prerank data pairs --items grocery_items.parquet --kind image_title -o image_pairs/",
    ),
)
def pairs(
    kind: Annotated[list[PairKind], typer.Option(help="What makes a pair; may be repeated.")],
    events: Annotated[Path | None, typer.Option(help="Behaviour log.")] = None,
    items: Annotated[Path | None, typer.Option(help="Item catalogue, for titles and groups.")] = None,
    until: Until = None,
    action: Action = "purchase",
    knobs: dict[str, Any] | None = None,
) -> Any:
    """Make pairs to train an encoder on: searched and bought, bought together, picture and title."""
    from prerank_tools.data.pair_stage import PairKnobs, Pairs

    return Pairs(
        tuple(sorted({one.value for one in kind})),
        events=events,
        items=items,
        until=until,
        action=action,
        knobs=parse_knobs(PairKnobs, knobs or {}),
    )


@stage_command(
    app,
    "features",
    examples=(
        "prerank data features --events events.parquet --requests r.parquet -o features/",
        "prerank data features --events events.parquet --requests r.parquet --items items.parquet "
        "-o features_all/",
    ),
)
def features(
    events: Annotated[Path, typer.Option(help="Behaviour log: a Parquet file or a folder of them.")],
    requests: Annotated[Path, typer.Option(help="Whose users, items and days to answer for.")],
    items: Annotated[
        Path | None, typer.Option(help="Catalogue: its items on every day of the requests, too.")
    ] = None,
    knobs: dict[str, Any] | None = None,
) -> Any:
    """Count what was known of each user and item strictly before each day, and how recent it was."""
    from prerank_tools.features.stage import FeatureConfig, Features

    config = parse_knobs(FeatureConfig, knobs or {})
    return Features(events, requests, items=items, config=config)
