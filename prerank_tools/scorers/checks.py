"""What a scorer's inputs are held against before any work: ids, columns, spaces, widths, time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.features.statistics import statistic_names
from prerank_tools.scorers.artefact import InputConfig, ScorerSpec
from prerank_tools.scorers.input_frames import vector_width
from prerank_tools.scorers.item_frames import same_ids
from prerank_tools.stage import Context

INLINE_EVENTS = 20_000_000  # item statistics of a longer log are computed once, by `data features`
SPACES = ("encoder", "user_model", "codebook")  # what a scorer and its inputs must have in common
# Fitted inputs: each carries the time up to which it has seen the log.
FITTED = ("embeddings", "users", "sids", "gsu", "user_features", "item_features", "model", "init_from")


def check_inputs(ctx: Context, config: InputConfig) -> None:
    """Refuse ids that never meet, columns that are not there, and a log too long to count anew each time."""
    requests, items, events = ctx.table("requests"), ctx.table("items"), ctx.table("events")
    candidates = "candidates" if "candidates" in requests.schema else "item_id"
    same_ids(requests, items, "item_id", inner=candidates)
    same_ids(events, items, "item_id")
    same_ids(events, requests, "user_id")
    same_ids(ctx.table("embeddings"), items, "item_id")
    for column in config.numbers:
        if column not in items.schema:
            raise ContractError(
                f"{items.path}: no column `{column}`", "name numeric columns in `inputs.numbers`"
            )
    if "item_features" not in ctx.inputs and events.rows > INLINE_EVENTS:
        raise UsageError(
            f"{events.path}: {events.rows} events are too many to count anew in every job",
            f"prerank data features --events {events.path} --requests {requests.path} -o features/, "
            "then --features features/",
        )
    if "gsu" in ctx.inputs and not {"simtier", "simtier_recent"} <= set(ctx.table("gsu").schema):
        raise ContractError(
            f"{ctx.table('gsu').path}: no columns `simtier` and `simtier_recent`",
            "prerank gsu topk ... --emit both",
        )
    for side in ("user", "item"):
        if f"{side}_features" in ctx.inputs:
            _check_features(ctx.table(f"{side}_features").schema, ctx.table(f"{side}_features").path)


def check_cutoffs(ctx: Context, start: int, *, what: str) -> None:
    """Refuse inputs that were fitted on events later than `start`: they would have seen the answers."""
    for role in FITTED:
        if role not in ctx.inputs:
            continue
        cutoff = ctx.inputs[role].data_cutoff
        if cutoff is not None and cutoff > start:
            raise ContractError(
                f"{ctx.inputs[role].path}: {role} has seen events up to {cutoff}, {what} starts at {start}",
                f"fit it again with --until {start}",
            )


def check_spaces(ctx: Context) -> None:
    """Refuse inputs that live in different spaces: another encoder, user model or codebook."""
    seen: dict[str, tuple[str, str]] = {}
    for role in ("model", "init_from", "embeddings", "users", "sids", "gsu"):
        if role not in ctx.inputs:
            continue
        for space in SPACES:
            value = ctx.inputs[role].lineage.get(space)
            if value is None:
                continue
            first, expected = seen.setdefault(space, (role, value))
            if value != expected:
                raise ContractError(
                    f"{ctx.inputs[role].path}: {role} of {space} {value[:12]}, {first} of {expected[:12]}",
                    "give tables of one space: those of the last training, or make them all again",
                )


def check_given(ctx: Context, spec: ScorerSpec) -> None:
    """Hold the tables against what the scorer was trained on: which of them, and how wide."""
    for role, width, flag in (("users", spec.user, "--users uemb/"), ("sids", spec.levels, "--sids sid/")):
        if width and role not in ctx.inputs:
            raise UsageError(f"the scorer was trained with {role}, and none are given", f"add {flag}")
        if not width and role in ctx.inputs:
            ctx.log("unused", role=role, reason="the scorer was trained without them")
    widths = {"embeddings": spec.content} | ({"users": spec.user} if spec.user else {})
    for role, width in widths.items():
        found = vector_width(ctx, role)
        if found != width:
            raise ContractError(
                f"{ctx.inputs[role].path}: vectors of width {found}, the scorer was trained on {width}",
                "give the table that the scorer was trained on, or train it again: prerank train scorer",
            )


def _check_features(schema: Iterable[str], path: Path) -> None:
    for name in statistic_names():
        if name not in schema:
            raise ContractError(
                f"{path}: no column `{name}`; it has {', '.join(schema)}",
                "write it with the default windows: prerank data features",
            )
